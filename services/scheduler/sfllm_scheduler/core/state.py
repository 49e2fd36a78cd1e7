"""The scheduler's tables and the invariants that hold between them after every event.

- A live request is in its gateway's table; it waits in its model's queue, or a worker holds it.
- A worker's used slots and cache tokens are the sums over what it holds, within its capacity.
- Credits of a cancelled request return when the cancel is sent: a worker hears its messages in
  order, so it has let go before it sees a grant that uses them.
- What has ended leaves only a short, bounded memory (`recent`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import msgspec

from sfllm.messages import ALL_CHOICES, Capacity, Message, ModelCard, Models, ModelState, WorkerCancel
from sfllm.wire import Array
from sfllm_scheduler.core.drain_rate import DrainRate
from sfllm_scheduler.core.events import Action, Field, Happening, Record, ToGateway, ToWorker
from sfllm_scheduler.core.expiry import Deadlines
from sfllm_scheduler.core.requests import Key, Rank, Request
from sfllm_scheduler.core.waiting import WaitingRequests

MAX_MODELS = 256
MAX_RECENT = 8192


class PolicyValues(msgspec.Struct, frozen=True, kw_only=True):
    """The values that govern decisions; `SchedulerSettings` explains each."""

    policy: str = "length"
    max_queue_requests: int = 1024
    max_overtakes: int = 16
    worker_wait_seconds: float = 30.0
    beat_seconds: float = 2.0
    lease_seconds: float = 6.0


class InvariantError(AssertionError):
    """The tables contradict each other: a bug, never something that a peer can cause."""


class HoldKey(NamedTuple):
    """Names one attempt on a worker: an old and a new attempt can be there at once."""

    key: Key
    attempt: int


class Hold:
    """Room that a request takes on a worker, until the last of its open choices has ended."""

    __slots__ = ("kv_tokens", "open_choices", "request", "slots")

    def __init__(self, request: Request, slots: int, kv_tokens: int) -> None:
        self.request = request
        self.slots = slots
        self.kv_tokens = kv_tokens
        self.open_choices = set(request.submit.choices)


class Worker:
    """A worker, its lease and what it holds. `heard` is when it was last heard of."""

    def __init__(self, peer: bytes, worker_id: str, card: ModelCard, capacity: Capacity, now: float) -> None:
        self.peer = peer
        self.worker_id = worker_id
        self.card = card
        self.capacity = capacity
        self.lease = 0
        self.heard = now
        self.draining = False
        self.idle_beats = 0
        self.holds: dict[HoldKey, Hold] = {}
        self.used_slots = 0
        self.used_kv_tokens = 0

    @property
    def free_slots(self) -> int:
        """Sequences that it could take now."""
        return self.capacity.slots - self.used_slots

    @property
    def free_kv_tokens(self) -> int:
        """Cache tokens that are not set aside."""
        return self.capacity.kv_tokens - self.used_kv_tokens

    def can_ever_run(self, request: Request) -> bool:
        """Whether it could run this waiting request when it held nothing else."""
        return (
            request.least_kv_tokens <= self.capacity.kv_tokens and request.longest < self.card.max_model_len
        )

    def slots_for(self, request: Request) -> int:
        """Sequences to set aside for it here; one with more choices runs them in several rounds."""
        return min(request.slots, self.capacity.slots)

    def charge(self, request: Request) -> int:
        """Cache to set aside for it here; one larger than the worker gets all of it, alone."""
        return min(request.kv_tokens, self.capacity.kv_tokens)

    def hold(self, request: Request) -> None:
        """Take the credits of a request that is about to be granted."""
        hold = Hold(request, self.slots_for(request), self.charge(request))
        self.holds[HoldKey(request.key, request.submit.attempt)] = hold
        request.worker = self.peer
        self.used_slots += hold.slots
        self.used_kv_tokens += hold.kv_tokens
        if self.free_slots < 0 or self.free_kv_tokens < 0:
            raise InvariantError(f"worker {self.worker_id} was granted more than it has room for")

    def release(self, key: HoldKey) -> Hold:
        """Give back the credits of a request that ended here."""
        hold = self.holds.pop(key)
        self.used_slots -= hold.slots
        self.used_kv_tokens -= hold.kv_tokens
        return hold


class Gateway:
    """A gateway and its live requests by handle."""

    def __init__(self, peer: bytes, now: float) -> None:
        self.peer = peer
        self.heard = now
        self.requests: dict[int, Request] = {}


class Model:
    """A model that some worker has served. It is remembered when its workers are gone.

    `workerless_since` is None while a worker takes requests. `recheck_at` is when to look
    whether everything that waits still fits a worker, after workers came or left.
    `may_grant` says that something changed since the last look for grants.
    """

    def __init__(self, card: ModelCard, now: float) -> None:
        self.card = card
        self.assets_ready = not card.assets
        self.waiting = WaitingRequests()
        self.workers: dict[bytes, Worker] = {}
        self.workerless_since: float | None = now
        self.recheck_at: float | None = None
        self.may_grant = False

    @property
    def serving(self) -> list[Worker]:
        """Its workers that take new requests."""
        return [worker for worker in self.workers.values() if not worker.draining]


class Ended(NamedTuple):
    """What is remembered of a request for a short while after it ended."""

    attempt: int
    rank: Rank
    forget_at: float


class State:
    """All tables. Functions of the other modules change them and `emit` what has to be done."""

    def __init__(self, policy: PolicyValues, epoch: int) -> None:
        self.policy = policy
        self.epoch = epoch
        self.actions: list[Action] = []
        self.gateways: dict[bytes, Gateway] = {}
        self.workers: dict[bytes, Worker] = {}
        self.models: dict[str, Model] = {}
        self.recent: OrderedDict[Key, Ended] = OrderedDict()
        self.deadlines = Deadlines()
        self.drain_rate = DrainRate()
        self.waiting_count = 0
        self.sequence = 0
        self.last_lease = 0
        self.next_beat = 0.0
        self.next_sweep = 0.0

    def emit(self, action: Action) -> None:
        """Add to what the event's handler gives back."""
        self.actions.append(action)

    def record(self, event: Happening, **fields: Field) -> None:
        """Add a log line or measurement."""
        self.actions.append(Record(event, fields))

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

    def enqueue(self, request: Request) -> None:
        """A new live request, waiting."""
        model = self.models[request.model]
        self.gateways[request.key.gateway].requests[request.key.handle] = request
        model.waiting.add(request)
        model.may_grant = True
        self.waiting_count += 1

    def end(self, request: Request, now: float) -> None:
        """Take a live request out of the tables. A worker that has it is told to cancel it."""
        del self.gateways[request.key.gateway].requests[request.key.handle]
        attempt = request.submit.attempt
        self.deadlines.discard(request.key, attempt)
        self.remember(request.key, Ended(attempt, request.rank, now + 2 * self.policy.lease_seconds))
        if request.worker is None:
            model = self.models[request.model]
            model.waiting.remove(request)
            model.may_grant = True  # who waited behind it may fit
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
        if worker.card.name in self.models:
            self.models[worker.card.name].may_grant = True
        return hold.request

    def remember(self, key: Key, ended: Ended) -> None:
        """Keep for a while that a request has ended, so that a repeated message is recognised."""
        self.recent[key] = ended
        self.recent.move_to_end(key)
        if len(self.recent) > MAX_RECENT:
            self.recent.popitem(last=False)

    def models_message(self) -> Models:
        """The list that gateways get."""
        return Models(
            tuple(
                ModelState(model.card, len(model.serving))
                for model in self.models.values()
                if model.assets_ready
            )
        )

    def announce_models(self) -> None:
        """Tell every gateway of a changed list."""
        message = self.models_message()
        for peer in self.gateways:
            self.emit(ToGateway(peer, message))
