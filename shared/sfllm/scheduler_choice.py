"""Which of several schedulers a worker belongs to. Pure: answers and times come in, a choice comes out.

Each worker ranks the schedulers by rendezvous hashing of its id and their addresses (`sfllm.rendezvous`). It
tries them in that order, and moves to a better one that is back. It asks the others now and then whether they
are there; one must have answered every time, without a restart in between, for a while before the worker
moves there. That while is longer for each time that the worker lost that scheduler, and differs from worker
to worker: a scheduler that comes and goes is not followed each time, and workers do not all drain at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from sfllm.rendezvous import member_key, ranked

PROBE_SECONDS = 1.0
"""How often a scheduler that answers is asked whether it is still there."""

LONGEST_PROBE_SECONDS = 30.0
"""One that does not answer is asked twice as rarely each time, down to this: questions wait for a
connection, and a fleet's questions of an hour would be a flood for a scheduler that starts."""

MISSED_PROBES = 2
"""A scheduler that has not answered after more questions than this is not there."""

WELCOME_SECONDS = 3.0
"""A scheduler that does not welcome a worker in this time is passed over for the next one."""

STEADY_SECONDS = 4.0
"""How long at least a better scheduler has been there before a worker moves to it."""

LONGEST_STEADY_SECONDS = 300.0
"""The same after many losses; a worker that was there for so long forgets earlier losses."""


class SchedulerChoice:
    """What one worker knows of its schedulers, which are named by their position in `addresses`.

    `current` is the one that it says hello to, or belongs to.
    """

    def __init__(self, worker_id: str, addresses: Sequence[str], now: float) -> None:
        self._addresses = tuple(addresses)
        self._order = ranked(worker_id, addresses)
        self.current = self._order[0]
        self._joined_at: float | None = None
        self._trying_since = now
        self._others = [_Other(now) for _ in addresses]
        spread = blake2b(b"patience", key=member_key(worker_id), digest_size=1).digest()[0] / 256
        self._first_patience = STEADY_SECONDS * (1 + 2 * spread)
        self._patience = [self._first_patience] * len(addresses)

    @property
    def current_address(self) -> str:
        """The address of the current scheduler."""
        return self._addresses[self.current]

    def to_probe(self, now: float) -> list[int]:
        """The schedulers to ask now whether they are there."""
        due = [index for index in self._order if index != self.current and self._others[index].ask_at <= now]
        for index in due:
            self._others[index].asked(now)
        return due

    def answered(self, index: int, epoch: int, now: float) -> None:
        """A scheduler is there; `epoch` is of its process."""
        self._others[index].answered(epoch, now)

    def see(self, joined: bool, now: float) -> None:
        """Note whether the worker belongs to `current`; without a welcome go on to another in time."""
        if joined and self._joined_at is None:
            self._joined_at = now
        elif not joined and self._joined_at is not None:
            self._count_loss(self._joined_at, now)
        if not joined and now - self._trying_since >= WELCOME_SECONDS:
            self.take(self._next(), now)

    def better(self) -> int | None:
        """A scheduler that the worker should move to, None to stay."""
        for index in self._order[: self._order.index(self.current)]:
            if self._others[index].steady_seconds >= self._patience[index]:
                return index
        return None

    def take(self, index: int, now: float) -> None:
        """From now on the worker says hello to that scheduler; it has parted with the other one."""
        self._others[self.current] = _Other(now + PROBE_SECONDS)
        self.current = index
        self._joined_at = None
        self._trying_since = now

    def _count_loss(self, joined_at: float, now: float) -> None:
        """The current scheduler was lost: be slower to come back to it."""
        forgiven = now - joined_at >= LONGEST_STEADY_SECONDS
        longer = 2 * (self._first_patience if forgiven else self._patience[self.current])
        self._patience[self.current] = min(longer, LONGEST_STEADY_SECONDS)
        self._joined_at = None
        self._trying_since = now

    def _next(self) -> int:
        """Where to try now: the best other one that is there or, when none is, the next one in order."""
        others = [index for index in self._order if index != self.current]
        place = self._order.index(self.current)
        after = self._order[(place + 1) % len(self._order)]
        return next((index for index in others if self._others[index].is_there), after)


class _Other:
    """A scheduler that the worker does not belong to. It is to be asked from `ask_at` on."""

    def __init__(self, ask_at: float) -> None:
        self.ask_at = ask_at
        self._interval = PROBE_SECONDS
        self._unanswered = 0
        self._epoch: int | None = None
        self._since = self._heard_at = 0.0

    @property
    def is_there(self) -> bool:
        return self._epoch is not None and self._unanswered <= MISSED_PROBES

    @property
    def steady_seconds(self) -> float:
        """How long it has been there, as far as its last answer shows; -1 while it is not there."""
        return self._heard_at - self._since if self.is_there else -1.0

    def asked(self, now: float) -> None:
        self._unanswered += 1
        self.ask_at = now + self._interval
        self._interval = min(2 * self._interval, LONGEST_PROBE_SECONDS)

    def answered(self, epoch: int, now: float) -> None:
        if epoch != self._epoch or not self.is_there:
            self._epoch, self._since = epoch, now
        self._heard_at = now
        self._unanswered = 0
        self._interval = PROBE_SECONDS
        self.ask_at = now + PROBE_SECONDS
