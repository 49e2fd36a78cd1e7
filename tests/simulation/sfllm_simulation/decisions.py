"""Invariants of what the scheduler decides, checked from outside while it decides.

Nobody is passed more often than the bound, no worker is left without what it could run, tables are bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sfllm.messages import Grant, Interrupted, Rejected
from sfllm_scheduler.core.admission import RETRY_QUEUE_FACTOR
from sfllm_scheduler.core.cohorts import POLICIES
from sfllm_scheduler.core.core import SchedulerCore
from sfllm_scheduler.core.events import Action, ToGateway, ToWorker
from sfllm_scheduler.core.requests import Key, Request
from sfllm_scheduler.core.state import MAX_RECENT, State
from sfllm_scheduler.core.workers import Worker

from .process import require

Attempt = tuple[Key, int]


class Decisions:
    """Follows the decisions of one core: `before` an event, `see` every action, `check` after a tick.

    It counts by itself how often each waiting request was passed. The bound is for each worker that serves
    the model, and holds for the most that there were.
    """

    def __init__(self, core: SchedulerCore) -> None:
        self._state: State = core.state
        policy = core.state.policy
        self._fair = POLICIES[policy.policy].fair
        self._bound = 0 if policy.policy == "fcfs" else policy.max_overtakes
        self._most_serving: Counter[str] = Counter()
        self._waiting: dict[Attempt, Request] = {}
        self._passed: Counter[Attempt] = Counter()

    def before(self) -> None:
        """Remember who waits: a grant in the actions that follow passes whoever of these is older."""
        for name, model in self._state.models.items():
            self._most_serving[name] = max(self._most_serving[name], model.fleet.serving, 1)
        self._waiting = {_attempt(request): request for request in self._all_waiting()}
        for gone in self._passed.keys() - self._waiting.keys():
            del self._passed[gone]

    def see(self, action: Action) -> None:
        """An action, in the order in which they are to be done."""
        if isinstance(action, ToGateway) and isinstance(action.message, Rejected | Interrupted):
            ended = action.message
            self._waiting.pop((Key(action.peer, ended.handle), ended.attempt), None)
        if not isinstance(action, ToWorker) or not isinstance(action.message, Grant):
            return
        worker = self._state.workers[action.peer]
        granted = [
            self._waiting.pop((Key(entry.gateway, entry.handle), entry.attempt))
            for entry in action.message.requests
        ]
        for request in granted:
            if not request.suspects:
                self._check_passed(worker, request)

    def check_no_worker_idles(self) -> None:
        """After a tick: no worker that may take more is left without a request that it could be granted.

        A request that would pass another one too often may not be granted, and suspects go by other rules.
        The scheduler's own count is never below the true one, but for a request that came again, with its old
        place, it may be above: who passed others while it was away counts too.
        """
        waiting = [request for request in self._all_waiting() if not request.suspects]
        for worker in self._state.workers.values():
            for request in waiting if worker.is_ready else ():
                idles = _fits(worker, request) and all(
                    self._counted(other) < self._bound * max(1, self._state.models[other.model].fleet.serving)
                    for other in waiting
                    if self._passes(request, other) and worker.can_ever_run(other)
                )
                require(not idles, "idle workers", f"{worker.worker_id} could be granted {request.key}")

    def check_bounded(self) -> None:
        """Nothing that the scheduler keeps grows past its bound."""
        state = self._state
        most = state.policy.max_queue_requests * RETRY_QUEUE_FACTOR
        require(state.waiting_count <= most, "bounds", f"{state.waiting_count} requests wait")
        require(len(state.recent) <= MAX_RECENT, "bounds", f"{len(state.recent)} ended ones are remembered")

    def _counted(self, request: Request) -> int:
        """How often the scheduler thinks that a request was passed."""
        group = self._state.models[request.model].waiting.classes[request.priority]
        return group.line_of(request).overtaking(request.rank)

    def _check_passed(self, worker: Worker, granted: Request) -> None:
        for attempt, other in self._waiting.items():
            if other.suspects or not self._passes(granted, other) or not worker.can_ever_run(other):
                continue
            self._passed[attempt] += 1
            times = self._passed[attempt]
            require(
                times <= self._bound * self._most_serving[other.model],
                "overtaking",
                f"{other.key} was passed {times} times, now by {granted.key}",
            )

    def _passes(self, request: Request, other: Request) -> bool:
        """Whether `other` came first, of the same priority and tenant."""
        same_tenant = not self._fair or other.submit.tenant == request.submit.tenant
        return other.rank < request.rank and other.priority == request.priority and same_tenant

    def _all_waiting(self) -> Iterator[Request]:
        for model in self._state.models.values():
            yield from model.waiting.by_submission()


def _attempt(request: Request) -> Attempt:
    return request.key, request.submit.attempt


def _fits(worker: Worker, request: Request) -> bool:
    return (
        worker.can_ever_run(request)
        and worker.slots_for(request) <= worker.free_slots
        and worker.charge(request) <= worker.free_kv_tokens
    )
