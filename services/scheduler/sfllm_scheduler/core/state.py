"""The scheduler's tables and the invariants that hold between them after every event.

- A live request is in its gateway's table; it waits in its model's queue, or a worker holds it.
- A worker's used slots and cache tokens are the sums over what it holds, within its capacity.
- Credits of a cancelled request return when the cancel is sent: a worker hears its messages in
  order, so it has let go before it sees a grant that uses them.
- What has ended leaves only a short, bounded memory (`recent`).
"""

from __future__ import annotations

from collections import OrderedDict
from math import inf
from typing import NamedTuple

import msgspec

from sfllm.messages import ALL_CHOICES, Message, ModelCard, Models, ModelState, Submit, WorkerCancel
from sfllm.wire import Array
from sfllm_scheduler.core.backlog import Backlog
from sfllm_scheduler.core.cohorts import POLICIES
from sfllm_scheduler.core.drain_rate import DrainRate
from sfllm_scheduler.core.events import Action, Field, Happening, Record, ToGateway, ToWorker
from sfllm_scheduler.core.expiry import Deadlines
from sfllm_scheduler.core.fleet import PROBES, Fleet
from sfllm_scheduler.core.output_lengths import OutputLengths
from sfllm_scheduler.core.pace import Pace
from sfllm_scheduler.core.rate_limits import Limits, RateLimits
from sfllm_scheduler.core.requests import Key, Rank, Request
from sfllm_scheduler.core.waiting import WaitingRequests
from sfllm_scheduler.core.workers import HoldKey, Worker

MAX_MODELS = 256
MAX_RECENT = 8192
MAX_ID_CHARACTERS = 200


class PolicyValues(msgspec.Struct, frozen=True, kw_only=True):
    """The values that govern decisions; `SchedulerSettings` explains each."""

    policy: str = "auto"
    max_queue_requests: int = 1024
    max_overtakes: int = 1_000
    target_ttft_seconds: float = 2.0
    tenant_weights: tuple[tuple[str, float], ...] = ()
    tenant_requests_per_minute: int | None = None
    tenant_tokens_per_minute: int | None = None
    tenant_limits: tuple[tuple[str, Limits], ...] = ()
    worker_wait_seconds: float = 30.0
    beat_seconds: float = 2.0
    lease_seconds: float = 6.0


class Gateway:
    """A gateway and its live requests by handle.

    `digest` is of their open choices; `asked` and `answered` count lists, as those of a worker do.
    """

    def __init__(self, peer: bytes, now: float) -> None:
        self.peer = peer
        self.heard = now
        self.requests: dict[int, Request] = {}
        self.digest = 0
        self.asked = 0
        self.answered = 0


class Model:
    """A model that some worker has served. It is remembered when its workers are gone.

    It is `expected` while none has: requests for it came before its workers did.
    `workerless_since` is None while a worker takes requests. `recheck_at` is when to look
    whether everything that waits still fits a worker, after workers came or left.
    `may_grant` says that something changed since the last look for grants.
    """

    def __init__(self, card: ModelCard, policy: PolicyValues, now: float) -> None:
        self.card = card
        self.expected = False
        self.assets_ready = not card.assets
        self.waiting = WaitingRequests(fair=POLICIES[policy.policy].fair, weights=dict(policy.tenant_weights))
        self.backlog = Backlog()
        self.outputs = OutputLengths()
        self.pace = Pace()
        self.fleet = Fleet()
        self.workerless_since: float | None = now
        self.recheck_at: float | None = None
        self.may_grant = False

    @property
    def workers(self) -> dict[bytes, Worker]:
        """All its workers, by routing id."""
        return self.fleet.workers


class Ended(NamedTuple):
    """What is remembered of a request for a short while after it ended.

    `asked` is how many lists its gateway had been asked for by then.
    """

    attempt: int
    rank: Rank
    forget_at: float
    asked: int


class State:
    """All tables. Functions of the other modules change them and `emit` what has to be done."""

    def __init__(self, policy: PolicyValues, epoch: int) -> None:
        self.policy = policy
        self.epoch = epoch
        self.started = inf
        self.actions: list[Action] = []
        self.gateways: dict[bytes, Gateway] = {}
        self.workers: dict[bytes, Worker] = {}
        self.models: dict[str, Model] = {}
        self.recent: OrderedDict[Key, Ended] = OrderedDict()
        self.deadlines = Deadlines()
        self.drain_rate = DrainRate()
        self.limits = RateLimits(
            policy.tenant_requests_per_minute, policy.tenant_tokens_per_minute, dict(policy.tenant_limits)
        )
        self.waiting_count = 0
        self.sequence = 0
        self.last_lease = 0
        self.next_beat = 0.0
        self.next_sweep = 0.0
        self.next_recall = 0.0

    def emit(self, action: Action) -> None:
        """Add to what the event's handler gives back."""
        self.actions.append(action)

    def record(self, event: Happening, **fields: Field) -> None:
        """Add a log line or measurement."""
        self.actions.append(Record(event, fields))

    def record_request(self, event: Happening, submit: Submit, **fields: Field) -> None:
        """Add a log line or measurement about a request."""
        traced = {"traceparent": submit.traceparent} if submit.traceparent else {}
        self.record(event, request_id=submit.request_id[:MAX_ID_CHARACTERS], **traced, **fields)

    def to_gateway(self, peer: bytes, message: Message, arrays: tuple[Array, ...] = ()) -> None:
        """Send to a gateway if it is known; what is for one that left needs no answer."""
        if peer in self.gateways:
            self.actions.append(ToGateway(peer, message, arrays))

    def find(self, key: Key) -> Request | None:
        """The live request of that name."""
        gateway = self.gateways.get(key.gateway)
        return gateway.requests.get(key.handle) if gateway else None

    def model_named(self, name: str) -> Model | None:
        """The model of that name or alias."""
        if name in self.models:
            return self.models[name]
        return next((model for model in self.models.values() if name in model.card.aliases), None)

    def add_model(self, card: ModelCard, now: float) -> Model | None:
        """Make an entry for a model, in place of an unused one if there are many; None if all are in use."""
        if len(self.models) >= MAX_MODELS:
            unused = (name for name, model in self.models.items() if not model.workers and not model.waiting)
            name = next(unused, None)
            if name is None:
                return None
            del self.models[name]
        model = self.models[card.name] = Model(card, self.policy, now)
        return model

    def enqueue(self, request: Request) -> None:
        """A new live request, waiting."""
        model = self.models[request.model]
        gateway = self.gateways[request.key.gateway]
        gateway.requests[request.key.handle] = request
        gateway.digest ^= request.mark
        request.asked = gateway.asked
        model.waiting.add(request)
        model.fleet.note_arrival(request)
        model.may_grant = True
        self.waiting_count += 1

    def close_choice(self, request: Request, choice: int) -> None:
        """One of several open choices has ended."""
        gateway = self.gateways[request.key.gateway]
        fingerprint = request.close(choice, gateway.asked)
        gateway.digest ^= fingerprint
        if request.worker is not None:
            self.workers[request.worker].digest ^= fingerprint

    def end(self, request: Request, now: float) -> None:
        """Take a live request out of the tables. A worker that has it is told to cancel it."""
        gateway = self.gateways[request.key.gateway]
        del gateway.requests[request.key.handle]
        gateway.digest ^= request.mark
        attempt = request.submit.attempt
        self.deadlines.discard(request.key, attempt)
        self.remember(request.key, attempt, request.rank, now)
        if request.worker is None:
            model = self.models[request.model]
            model.waiting.remove(request)
            self.queue_changed(model)
            self.waiting_count -= 1
            return
        worker = self.workers.get(request.worker)
        key = HoldKey(request.key, attempt)
        if worker is not None and key in worker.holds:
            self.release(worker, key)
            cancel = WorkerCancel(worker.lease, *request.key, attempt, ALL_CHOICES)
            self.emit(ToWorker(worker.peer, cancel))

    def release(self, worker: Worker, key: HoldKey) -> Request:
        """Return the credits of a request."""
        hold = worker.release(key)
        self.worker_changed(worker)
        return hold.request

    def worker_changed(self, worker: Worker) -> None:
        """A worker's load is another, or it could take more than before."""
        model = self.models.get(worker.card.name)
        if model is not None:
            model.fleet.update(worker)
            model.may_grant = True

    def queue_changed(self, model: Model) -> None:
        """Something that waited has gone or got smaller, and others may fit where nothing did."""
        model.fleet.look_again(PROBES)
        model.may_grant = True

    def remember(self, key: Key, attempt: int, rank: Rank, now: float) -> None:
        """Keep for a while that a request has ended, so that a repeated message is recognised."""
        forget_at = now + 2 * self.policy.lease_seconds
        self.recent[key] = Ended(attempt, rank, forget_at, self.gateways[key.gateway].asked)
        self.recent.move_to_end(key)
        if len(self.recent) > MAX_RECENT:
            self.recent.popitem(last=False)

    def models_message(self) -> Models:
        """The list that gateways get."""
        return Models(
            tuple(
                ModelState(model.card, model.fleet.serving)
                for model in self.models.values()
                if model.assets_ready and not model.expected
            )
        )

    def announce_models(self) -> None:
        """Tell every gateway of a changed list."""
        message = self.models_message()
        for peer in self.gateways:
            self.emit(ToGateway(peer, message))
