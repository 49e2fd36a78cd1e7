"""Drives the scheduler core as gateways and workers would, in lines that read like a script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from sfllm.holdings import OpenChoice, digest
from sfllm.messages import (
    ALL_CHOICES,
    Asset,
    Cancel,
    Capacity,
    Finished,
    GatewayBeat,
    GatewayHeld,
    GatewayHello,
    Grant,
    GrantedRequest,
    Message,
    ModelCard,
    Sampling,
    Submit,
    Timings,
    WorkerBeat,
    WorkerBye,
    WorkerFinished,
    WorkerHeld,
    WorkerHello,
    WorkerProgress,
    WorkerWelcome,
)
from sfllm.wire import Array, as_array
from sfllm_scheduler.core.core import SchedulerCore
from sfllm_scheduler.core.events import (
    Action,
    Event,
    FromGateway,
    FromWorker,
    Record,
    Tick,
    ToGateway,
    ToWorker,
)
from sfllm_scheduler.core.state import PolicyValues
from sfllm_scheduler.core.workers import Worker

M = TypeVar("M", bound=Message)

EPOCH = 4711
GATEWAY = b"g-1"


def card(
    name: str = "m", *, aliases: tuple[str, ...] = (), assets: tuple[Asset, ...] = (), **changes: int
) -> ModelCard:
    values = {"created": 0, "max_model_len": 4096, "vocab_size": 1000} | changes
    return ModelCard(name=name, aliases=aliases, root=name, eos_token_ids=(2,), assets=assets, **values)


def finished(granted: GrantedRequest, choice: int | None = None, reason: str = "stop") -> Finished:
    return Finished(
        handle=granted.handle,
        attempt=granted.attempt,
        choice=granted.choices[0] if choice is None else choice,
        reason=reason,
        stop_token_id=2,
        prompt_tokens=granted.prompt_count,
        cached_tokens=0,
        generated_tokens=1,
        timings=Timings(),
    )


class Driver:
    """A core, a clock that tests move, and everything that the core has sent so far."""

    def __init__(self, **policy: object) -> None:
        self.core = SchedulerCore(PolicyValues(**policy), EPOCH)  # type: ignore[arg-type] # tests name fields
        self.now = 100.0
        self.log: list[Action] = []
        self.handles = 0

    def send(self, event: Event) -> list[Action]:
        actions = self.core.handle(event, self.now)
        self.core.check_integrity()
        self.log += actions
        return actions

    def tick(self, seconds: float = 0.0) -> list[Action]:
        """Let time pass in small turns, as the loop does; live peers are not beating meanwhile."""
        self.now += seconds
        return self.send(Tick())

    # gateways ------------------------------------------------------------------------

    def gateway(self, peer: bytes = GATEWAY) -> bytes:
        self.send(FromGateway(peer, GatewayHello(1)))
        return peer

    def submit(
        self, tokens: int = 10, *, gateway: bytes = GATEWAY, handle: int | None = None, **changes: object
    ) -> int:
        """Submit a request of that many prompt tokens; its handle."""
        if handle is None:
            self.handles += 1
            handle = self.handles
        generated = changes.pop("generated", ())
        counts = changes.pop("generated_counts", None)
        max_tokens = changes.pop("max_tokens", 16)
        values: dict[str, object] = {
            "request_id": f"r{handle}",
            "attempt": 0,
            "model": "m",
            "choices": (0,),
            "priority": 0,
            "milliseconds_left": 600_000,
        } | changes
        names = values.pop("names", ())
        choices = values["choices"]
        assert isinstance(choices, tuple)
        message = Submit(
            handle=handle,
            generated_counts=counts or (0,) * len(choices),
            sampling=Sampling(max_tokens=max_tokens, seed=1),
            **values,
        )
        arrays = (as_array("I", range(tokens)), as_array("I", generated), as_array("Q", names))
        self.send(FromGateway(gateway, message, arrays))
        return handle

    def submit_to_model_without_worker(self, tokens: int = 10, **changes: object) -> int:
        """Submit for a model that had a worker, which has just left."""
        self.leave(self.worker("passing"))
        return self.submit(tokens, **changes)

    def cancel(self, handle: int, attempt: int = 0, choice: int = ALL_CHOICES) -> None:
        self.send(FromGateway(GATEWAY, Cancel(handle, attempt, choice, "test")))

    def to_gateway(self, kind: type[M], peer: bytes = GATEWAY) -> list[M]:
        """Every message of that kind that the gateway was sent."""
        sent = [
            action.message for action in self.log if isinstance(action, ToGateway) and action.peer == peer
        ]
        return [message for message in sent if isinstance(message, kind)]

    # workers ------------------------------------------------------------------------

    def worker(
        self,
        name: str = "W1",
        *,
        slots: int = 4,
        kv_tokens: int = 4096,
        step_tokens: int = 512,
        model: ModelCard | None = None,
    ) -> bytes:
        """Join a worker; its routing id is `w-` and its name."""
        peer = b"w-" + name.encode()
        capacity = Capacity(slots, kv_tokens, step_tokens)
        self.send(FromWorker(peer, WorkerHello(name, model or card(), capacity)))
        return peer

    def leave(self, peer: bytes) -> None:
        """The worker says goodbye."""
        self.send(FromWorker(peer, WorkerBye(self.lease(peer))))

    def lease(self, peer: bytes) -> int:
        return self.to_worker(WorkerWelcome, peer)[-1].lease

    def state_of(self, peer: bytes) -> Worker:
        return self.core.state.workers[peer]

    def to_worker(self, kind: type[M], peer: bytes) -> list[M]:
        """Every message of that kind that the worker was sent."""
        sent = [action.message for action in self.log if isinstance(action, ToWorker) and action.peer == peer]
        return [message for message in sent if isinstance(message, kind)]

    def grants(self, peer: bytes) -> list[list[int]]:
        """The handles of each cohort that the worker was granted."""
        return [[entry.handle for entry in grant.requests] for grant in self.to_worker(Grant, peer)]

    def all_granted(self, peer: bytes) -> list[int]:
        """The handles of all that the worker was granted, in that order."""
        return [handle for cohort in self.grants(peer) for handle in cohort]

    def granted(self, handle: int) -> GrantedRequest:
        """The newest grant of that request, to whichever worker."""
        grants = [a.message for a in self.log if isinstance(a, ToWorker) and isinstance(a.message, Grant)]
        return [entry for grant in grants for entry in grant.requests if entry.handle == handle][-1]

    def finish(self, peer: bytes, handle: int, choice: int | None = None, reason: str = "stop") -> None:
        entry = self.granted(handle)
        message = WorkerFinished(self.lease(peer), entry.gateway, finished(entry, choice, reason))
        self.send(FromWorker(peer, message))

    def worker_beat(
        self,
        peer: bytes,
        held: Iterable[OpenChoice] | None = None,
        *,
        slots: int = 0,
        step_curve: tuple[float, ...] = (),
        names: Sequence[int] = (),
    ) -> None:
        """The worker beats: it holds what it should, or just these choices."""
        mark = self.state_of(peer).digest if held is None else digest(held)
        beat = WorkerBeat(self.lease(peer), 1, 0, 0, 100, mark, slots, step_curve)
        self.send(FromWorker(peer, beat, (as_array("Q", names),)))

    def progress(self, peer: bytes, pending_tokens: int = 0, grants: int | None = None) -> None:
        """The worker has taken in prompts: so much is left of all its grants, or of so many."""
        grants = len(self.to_worker(Grant, peer)) if grants is None else grants
        self.send(FromWorker(peer, WorkerProgress(self.lease(peer), grants, pending_tokens)))

    def gateway_beat(self, peer: bytes = GATEWAY, held: Iterable[OpenChoice] | None = None) -> None:
        """The gateway beats: its open choices are those that it should have, or just these."""
        mark = self.core.state.gateways[peer].digest if held is None else digest(held)
        self.send(FromGateway(peer, GatewayBeat(1, mark)))

    def worker_lists(self, peer: bytes, *held: OpenChoice, number: int | None = None) -> None:
        """The worker answers the newest question, or an older one."""
        gateways = tuple(dict.fromkeys(choice.gateway for choice in held))
        columns = zip(
            *[(gateways.index(c.gateway), c.handle, c.attempt, c.choice) for c in held], strict=True
        )
        arrays = tuple(map(as_array, "IQII", list(columns) or [()] * 4))
        number = self.state_of(peer).asked if number is None else number
        self.send(FromWorker(peer, WorkerHeld(self.lease(peer), number, gateways), arrays))

    def gateway_lists(self, *held: OpenChoice, number: int | None = None) -> None:
        """The gateway answers the newest question, or an older one."""
        columns = list(zip(*[(c.handle, c.attempt, c.choice) for c in held], strict=True)) or [()] * 3
        arrays = tuple(map(as_array, "QII", columns))
        number = self.core.state.gateways[GATEWAY].asked if number is None else number
        self.send(FromGateway(GATEWAY, GatewayHeld(number), arrays))

    def records(self, event: str) -> list[Record]:
        return [action for action in self.log if isinstance(action, Record) and action.event == event]


def lists(arrays: Sequence[Array]) -> list[list[int]]:
    return [list(view) for view in arrays]
