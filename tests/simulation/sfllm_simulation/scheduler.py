"""The scheduler's process: the core, and a loop around it like the live one's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from sfllm import wire
from sfllm.messages import GATEWAY_TO_SCHEDULER, WORKER_TO_SCHEDULER, Interrupted, ListHeld
from sfllm_scheduler.core.core import SchedulerCore
from sfllm_scheduler.core.events import (
    Action,
    Event,
    FromGateway,
    FromWorker,
    GatewayUnreachable,
    ModelReady,
    NeedAssets,
    Record,
    Tick,
    ToGateway,
    ToWorker,
    WorkerUnreachable,
)
from sfllm_scheduler.core.state import PolicyValues

from .agenda import Agenda
from .decisions import Decisions
from .network import Link
from .process import Process, encoded, require

TURN_SECONDS = 0.05
"""Without messages the live loop turns as often."""

_decode_gateway = wire.decoder(GATEWAY_TO_SCHEDULER)
_decode_worker = wire.decoder(WORKER_TO_SCHEDULER)


class Scheduler(Process):
    """A core that is checked after everything it did. `links` are the connections that it has now.

    `asked_at` is when it last found that a peer holds something else than it thinks.
    """

    def __init__(
        self,
        agenda: Agenda,
        policy: PolicyValues,
        epoch: int,
        clock_offset: float,
        links: dict[bytes, Link],
        on_record: Callable[[Record], None],
    ) -> None:
        super().__init__(agenda, "scheduler", clock_offset)
        self.core = SchedulerCore(policy, epoch)
        self.asked_at = 0.0
        self._decisions = Decisions(self.core)
        self._links = links
        self._on_record = on_record
        self.every(TURN_SECONDS, lambda: self._handle(Tick()))

    def from_gateway(self, peer: bytes, frame: bytes) -> None:
        """A message arrived."""
        message, arrays = _decode_gateway(frame)
        self.do(lambda: self._handle(FromGateway(peer, message, arrays)))

    def from_worker(self, peer: bytes, frame: bytes) -> None:
        """A message arrived."""
        message, arrays = _decode_worker(frame)
        self.do(lambda: self._handle(FromWorker(peer, message, arrays)))

    def after_work(self) -> None:
        """The end of a turn."""
        self._handle(Tick())

    def _handle(self, event: Event) -> None:
        events = deque([event])
        changed = followed = False
        while events:
            self._decisions.before()
            held = {worker.worker_id: len(worker.holds) for worker in self.core.state.workers.values()}
            for action in self.core.handle(events.popleft(), self.clock):
                changed = True
                _check_blame(action, held)
                self._decisions.see(action)
                followed_by = self._perform(action)
                if followed_by is not None:
                    followed = True
                    events.append(followed_by)
        if changed or not isinstance(event, Tick):
            self.core.check_integrity()
            self._decisions.check_bounded()
        if isinstance(event, Tick) and not followed:
            self._decisions.check_no_worker_idles()

    def _perform(self, action: Action) -> Event | None:
        match action:
            case ToGateway():
                if isinstance(action.message, ListHeld):
                    self.asked_at = self.agenda.now
                if not self._send(action):
                    return GatewayUnreachable(action.peer)
            case ToWorker():
                if isinstance(action.message, ListHeld):
                    self.asked_at = self.agenda.now
                if not self._send(action):
                    return WorkerUnreachable(action.peer)
            case NeedAssets():
                return ModelReady(action.card)
            case Record():
                self._on_record(action)
            case _:
                pass  # nothing waits for a peer here
        return None

    def _send(self, action: ToGateway | ToWorker) -> bool:
        link = self._links.get(action.peer)
        if link is None:
            return False
        link.to_process.send(encoded(action.message, action.arrays))
        return True


def _check_blame(action: Action, held: dict[str, int]) -> None:
    """Only what was alone on a worker counts as alone; `held` says how many requests each had."""
    if isinstance(action, ToGateway) and isinstance(action.message, Interrupted):
        message = action.message
        alone = message.suspects != 1 or held[message.worker] == 1
        require(alone, "blame", f"{message} blames one of {held.get(message.worker)} requests")
