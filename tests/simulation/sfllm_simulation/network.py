"""The network between one process and the scheduler, as ZeroMQ over TCP shows it, and worse.

A connection delivers in order and loses nothing while it lasts. When it breaks (a process died, heartbeats
were missed for two seconds), what was under way is lost in both directions. The process' side is
a DEALER: what it sends while there is no connection waits in its outbox and leaves at the next one. The
scheduler's side is a ROUTER with ROUTER_MANDATORY: a send to a peer without a connection fails at once.
Noise goes beyond what TCP allows: single messages are lost, doubled or overtaken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

from .agenda import Agenda
from .script import Noise

Deliver = Callable[[bytes], None]

SHORTEST_DELAY_SECONDS = 0.0002
LONGEST_DELAY_SECONDS = 0.004
LATE_SECONDS = 0.5
"""A message that noise delays comes up to so much later than others behind it."""

HEARTBEAT_SECONDS = 2.0
"""Without signs of life for so long, libzmq closes the connection."""

RECONNECT_SECONDS = (0.05, 0.5)
OUTBOX_MESSAGES = 4096


class Pipe:
    """One direction. While it is cut, messages wait as they do in TCP; they are lost if the connection is."""

    def __init__(self, agenda: Agenda, seed: str, deliver: Deliver) -> None:
        self.noise: Noise | None = None
        self.delivered = 0
        self._agenda = agenda
        self._random = Random(seed)
        self._deliver = deliver
        self._cut = False
        self._waiting: list[bytes] = []
        self._connection = 0
        self._last_arrival = 0.0

    def send(self, frame: bytes) -> None:
        """Take a message."""
        if self._cut:
            self._waiting.append(frame)
            return
        chance, noise = self._random, self.noise
        copies = 1
        if noise is not None:
            if chance.random() * 100 < noise.drops:
                return
            copies += chance.random() * 100 < noise.doubles
        for _ in range(copies):
            arrival = self._agenda.now + chance.uniform(SHORTEST_DELAY_SECONDS, LONGEST_DELAY_SECONDS)
            if noise is not None and chance.random() * 100 < noise.delays:
                arrival += chance.uniform(0.0, LATE_SECONDS)
            else:
                arrival = self._last_arrival = max(arrival, self._last_arrival)
            self._agenda.at(arrival, partial(self._arrive, self._connection, frame))

    def cut(self, is_cut: bool) -> None:
        """Begin or end a cut."""
        self._cut = is_cut
        if not is_cut:
            waiting, self._waiting = self._waiting, []
            for frame in waiting:
                self.send(frame)

    def lose(self) -> None:
        """The connection broke: nothing that is under way arrives."""
        self._connection += 1
        self._waiting.clear()

    def _arrive(self, connection: int, frame: bytes) -> None:
        if connection == self._connection:
            self.delivered += 1
            self._deliver(frame)


class Link:
    """A process' connection to the scheduler. `blocked_by` names what keeps it from being one.

    `on_reach` hears whether the scheduler can send to this process now.
    """

    def __init__(
        self,
        agenda: Agenda,
        seed: str,
        to_scheduler: Deliver,
        to_process: Deliver,
        on_reach: Callable[[bool], None],
    ) -> None:
        self.to_scheduler = Pipe(agenda, f"{seed} up", to_scheduler)
        self.to_process = Pipe(agenda, f"{seed} down", to_process)
        self.outbox: list[bytes] = []
        self.connected = False
        self._agenda = agenda
        self._random = Random(f"{seed} connection")
        self._on_reach = on_reach
        self._blocked_by: set[str] = set()
        self._change = 0
        self._closed = False
        self._connect_soon()

    def send(self, frame: bytes) -> None:
        """From the process to the scheduler: now, or when there is a connection again."""
        if self._closed:
            return
        if self.connected:
            self.to_scheduler.send(frame)
        elif len(self.outbox) < OUTBOX_MESSAGES:
            self.outbox.append(frame)
        else:
            raise AssertionError("an outbox grew past its bound")

    def block(self, cause: str) -> None:
        """Something stops the bytes; if it lasts, the connection breaks."""
        if not self._blocked_by:
            self._change += 1
            self._agenda.after(HEARTBEAT_SECONDS, partial(self._miss_heartbeats, self._change))
        self._blocked_by.add(cause)

    def unblock(self, cause: str) -> None:
        """What stopped the bytes is over."""
        self._blocked_by.discard(cause)
        if not self._blocked_by:
            self._change += 1
            if not self.connected:
                self._connect_soon()

    def break_off(self) -> None:
        """The connection is gone, with everything that was under way."""
        self.to_scheduler.lose()
        self.to_process.lose()
        if self.connected:
            self.connected = False
            self._on_reach(False)

    def die(self, takes_along: bool) -> None:
        """The process is gone for good; what it had sent may still arrive, or goes with it."""
        self._closed = True
        self._change += 1
        self.to_process.lose()
        if takes_along:
            self.to_scheduler.lose()
        if self.connected:
            self.connected = False
            self._on_reach(False)

    def _miss_heartbeats(self, change: int) -> None:
        if change == self._change and self._blocked_by and not self._closed:
            self.break_off()

    def _connect_soon(self) -> None:
        self._agenda.after(self._random.uniform(*RECONNECT_SECONDS), partial(self._connect, self._change))

    def _connect(self, change: int) -> None:
        if change != self._change or self._closed or self.connected:
            return
        self.connected = True
        self._on_reach(True)
        waiting, self.outbox = self.outbox, []
        for frame in waiting:
            self.send(frame)
