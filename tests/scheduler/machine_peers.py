"""Honest gateways and workers around a core, on links that lose what they are told to lose."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from sys import maxsize

from core_driver import EPOCH
from fake_peers import KV_TOKENS, SLOTS, FakeGateway, FakeRequest, FakeWorker

from sfllm.messages import (
    Admitted,
    Cancel,
    Finished,
    Grant,
    Interrupted,
    ListHeld,
    Message,
    Recall,
    Rejected,
    Submit,
    WorkerCancel,
    WorkerFinished,
    WorkerProgress,
    WorkerReturned,
    WorkerUnknown,
    WorkerWelcome,
)
from sfllm.wire import Array
from sfllm_scheduler.core.cohorts import POLICIES, Room
from sfllm_scheduler.core.core import SchedulerCore
from sfllm_scheduler.core.events import (
    Event,
    FromGateway,
    FromWorker,
    ToGateway,
    ToWorker,
)
from sfllm_scheduler.core.requests import Key, Rank
from sfllm_scheduler.core.state import PolicyValues

MAX_OVERTAKES = 1
MAX_QUEUE = 12

LOSSES = (
    Submit,
    Cancel,
    Finished,
    Rejected,
    Interrupted,
    Admitted,
    Grant,
    Recall,
    WorkerCancel,
    WorkerFinished,
    WorkerProgress,
    WorkerReturned,
)


class Peers:
    """Honest gateways and workers around a core, on links that keep the order and lose what they are told to.

    An answer to `ListHeld` is made at once and arrives before the next message of its peer: whatever the
    core sends in between was under way when the list was made.
    """

    policy = "length"

    def __init__(self) -> None:
        super().__init__()
        values = PolicyValues(
            policy=self.policy,
            max_overtakes=MAX_OVERTAKES,
            max_queue_requests=MAX_QUEUE,
            worker_wait_seconds=8.0,
        )
        self.core = SchedulerCore(values, EPOCH)
        self.now = 0.0
        self.gateways: dict[bytes, FakeGateway] = {}
        self.workers: dict[bytes, FakeWorker] = {}
        self.names = 0
        self.most_serving = 1
        self.ends: dict[tuple[bytes, int, int], int] = defaultdict(int)
        self.to_lose: list[type[Message]] = []
        self.is_lossy = False
        self.recalled: list[tuple[bytes, tuple[bytes, int, int]]] = []
        self.answers: dict[bytes, FromGateway | FromWorker] = {}

    def send(self, event: Event) -> None:
        if isinstance(event, FromGateway | FromWorker):
            if (answer := self.answers.pop(event.peer, None)) is not None:
                self.perform(answer)
            if self.loses(event.message):
                return
        self.perform(event)
        model = self.core.state.models.get("m")
        if model is not None:
            self.most_serving = max(self.most_serving, model.fleet.serving)

    def perform(self, event: Event) -> None:
        for action in self.core.handle(event, self.now):
            if isinstance(action, ToGateway):
                self.gateway_hears(self.gateways[action.peer], action.message)
            elif isinstance(action, ToWorker):
                self.worker_hears(self.workers[action.peer], action.message)

    def from_worker(self, worker: FakeWorker, message: Message, arrays: tuple[Array, ...] = ()) -> None:
        self.send(FromWorker(worker.peer, message, arrays))

    def loses(self, message: Message) -> bool:
        if type(message) not in self.to_lose:
            return False
        self.to_lose.remove(type(message))
        self.is_lossy = True
        return True

    # what the peers hear --------------------------------------------------------------

    def gateway_hears(self, gateway: FakeGateway, message: Message) -> None:
        if isinstance(message, ListHeld):
            self.answers[gateway.peer] = FromGateway(gateway.peer, *gateway.list_of(message.number))
            return
        if not isinstance(message, Admitted | Rejected | Interrupted | Finished):
            return
        request = gateway.requests.get(message.handle)
        if request is None or request.submit.attempt != message.attempt:
            return
        key = (gateway.peer, message.handle, message.attempt)
        if isinstance(message, Admitted):
            if not request.waits and not any(key in worker.held for worker in self.workers.values()):
                request.waits, request.passed_by = True, 0
        elif not isinstance(message, Finished):
            request.waits = False
        if not self.loses(message):
            self.note_end(request, key, message)

    def note_end(self, request: FakeRequest, key: tuple[bytes, int, int], message: Message) -> None:
        if self.is_lossy and (request.over or request.ended):
            return  # a list and a repeated message can both be answered; the first end counts
        if isinstance(message, Rejected):
            request.over = request.ended = True
            self.ends[key] += 1
        elif isinstance(message, Interrupted):
            request.over = True
            self.ends[key] += message.cause != "already_ended"
        elif isinstance(message, Finished):
            assert message.choice not in request.finished, "a choice finished twice"
            was_open = bool(request.left)
            request.finished.add(message.choice)
            if was_open and not request.left:
                request.ended = True
                self.ends[key] += 1

    def worker_hears(self, worker: FakeWorker, message: Message) -> None:
        match message:
            case WorkerWelcome():
                worker.lease, worker.held, worker.grants = message.lease, {}, 0
            case Grant():
                assert message.lease == worker.lease
                assert not worker.draining, "a grant for a worker that drains"
                self.check_overtaking(worker.peer, message)
                for entry in message.requests:
                    self.gateways[entry.gateway].requests[entry.handle].waits = False
                if not self.loses(message):
                    worker.grants += 1
                    for entry in message.requests:
                        worker.take(entry)
                self.check_room(worker)
            case WorkerCancel() if not self.loses(message):
                assert message.lease == worker.lease
                worker.let_go(message)
            case ListHeld():
                self.answers[worker.peer] = FromWorker(worker.peer, *worker.list_of(message.number))
            case Recall() if not self.loses(message):
                assert message.lease == worker.lease
                self.recalled.append((worker.peer, (message.gateway, message.handle, message.attempt)))
            case WorkerUnknown():
                raise AssertionError("every worker of this test is known")

    def check_room(self, worker: FakeWorker) -> None:
        used = [entry for entry, _ in worker.held.values()]
        if not self.is_lossy:
            assert sum(len(entry.choices) for entry in used) <= SLOTS
            assert sum(entry.prompt_count for entry in used) <= KV_TOKENS

    def check_overtaking(self, worker: bytes, grant: Grant) -> None:
        state = self.core.state
        granted = {(entry.gateway, entry.handle) for entry in grant.requests}
        rivals = {key: self.gateways[key[0]].requests[key[1]] for key in granted}
        for peer, gateway in self.gateways.items():
            for handle, request in gateway.requests.items():
                live = state.find(Key(peer, handle)) if request.waits else None
                if live is None or (peer, handle) in granted or request.is_suspect:
                    continue
                if live.worker is not None:  # its grant was lost, which nobody knows yet
                    continue
                if not state.workers[worker].can_ever_run(live):
                    continue
                request.passed_by += sum(
                    not rival.is_suspect
                    and rival.submit.priority == request.submit.priority
                    and self.rank(other) > self.rank((peer, handle))
                    for other, rival in rivals.items()
                )
                bound = MAX_OVERTAKES * self.most_serving
                assert request.passed_by <= bound, f"{(peer, handle)} was passed too often"

    def rank(self, key: tuple[bytes, int]) -> Rank:
        """The place of a live request in the order of arrival."""
        request = self.core.state.find(Key(*key))
        assert request is not None
        return request.rank

    def check_nobody_idles(self) -> None:
        """No worker with room and less prefill than its window is left without what it could be granted."""
        state = self.core.state
        model = state.models.get("m")
        for worker in model.workers.values() if model is not None else ():
            if model is None or worker.draining or worker.probation or worker.reserved is not None:
                continue
            left = worker.prefill_window - worker.prefill.tokens
            uncached = partial(model.fleet.uncached, worker)
            room = Room(worker, maxsize, avoid=False, prefill_tokens=left, uncached=uncached)
            cohort = POLICIES[self.policy].cohort(
                model.waiting, room, self.now, MAX_OVERTAKES * max(1, model.fleet.serving)
            )
            assert not cohort, f"{worker.worker_id} could be granted {len(cohort)} requests that wait"
        for worker in state.workers.values():
            if not worker.holds and not worker.draining:
                waiting = state.models["m"].waiting.by_submission()
                runnable = [request for request in waiting if worker.can_ever_run(request)]
                assert not runnable, f"{worker.worker_id} idles while {len(runnable)} requests wait"
