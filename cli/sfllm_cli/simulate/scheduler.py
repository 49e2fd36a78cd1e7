"""A scheduler's process: the real core, and turns like those of the live loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sfllm_cli.simulate.agenda import Agenda
from sfllm_scheduler.core.core import SchedulerCore
from sfllm_scheduler.core.events import (
    Action,
    Event,
    ModelReady,
    NeedAssets,
    Record,
    Tick,
    ToGateway,
    ToWorker,
)
from sfllm_scheduler.core.state import PolicyValues

IDLE_TURN_SECONDS = 0.05
"""The live loop turns as often when nothing comes."""

_TICK = Tick()


class SimulatedScheduler:
    """A core, the events that are on their way to it, and what its actions are for.

    What was sent within a link's delay is handled in one turn, as the live loop does with what has come.
    `clock` measures the CPU seconds that the core takes; it has no part in the simulation.
    """

    def __init__(
        self,
        agenda: Agenda,
        policy: PolicyValues,
        epoch: int,
        link_seconds: float,
        to_gateway: Callable[[ToGateway], None],
        to_worker: Callable[[ToWorker], None],
        on_record: Callable[[Record], None],
        clock: Callable[[], float],
    ) -> None:
        self.epoch = epoch
        self.alive = True
        self.core = SchedulerCore(policy, epoch)
        self.cpu_seconds = 0.0
        self._agenda = agenda
        self._link_seconds = link_seconds
        self._to_gateway = to_gateway
        self._to_worker = to_worker
        self._on_record = on_record
        self._clock = clock
        self._inbox: list[Event] = []
        self._turn_is_due = False

    def start(self) -> None:
        """Turn now and then from now on, whatever comes."""
        if self.alive:
            self._turn()
            self._agenda.after(IDLE_TURN_SECONDS, self.start)

    def kill(self) -> list[Event]:
        """End the process: nothing comes from it any more. What was on its way to it."""
        self.alive = False
        lost, self._inbox = self._inbox, []
        return lost

    def post(self, event: Event) -> None:
        """Something is on its way."""
        if not self.alive:
            return
        self._inbox.append(event)
        if not self._turn_is_due:
            self._turn_is_due = True
            self._agenda.after(self._link_seconds, self._turn)

    def digest_of_gateway(self, peer: bytes) -> int:
        """What it thinks that a gateway holds."""
        gateway = self.core.state.gateways.get(peer)
        return gateway.digest if gateway is not None else 0

    def digest_of_worker(self, peer: bytes) -> int:
        """What it thinks that a worker holds."""
        worker = self.core.state.workers.get(peer)
        return worker.digest if worker is not None else 0

    def _turn(self) -> None:
        self._turn_is_due = False
        if not self.alive:
            return
        events: deque[Event] = deque(self._inbox)
        self._inbox.clear()
        now, core, clock = self._agenda.now, self.core, self._clock
        events.append(_TICK)
        while events:
            event = events.popleft()
            began = clock()
            actions = core.handle(event, now)
            self.cpu_seconds += clock() - began
            for action in actions:
                self._perform(action, events)

    def _perform(self, action: Action, events: deque[Event]) -> None:
        match action:
            case ToGateway():
                self._to_gateway(action)
            case ToWorker():
                self._to_worker(action)
            case Record():
                self._on_record(action)
            case NeedAssets():
                events.appendleft(ModelReady(action.card))
            case _:
                pass  # nothing waits for a peer here
