"""A worker as the scheduler sees it: its lease, what it holds, and the credits that this takes."""

from __future__ import annotations

from functools import reduce
from operator import xor
from typing import NamedTuple

from sfllm.messages import PROBATION_TOKENS, Capacity, ModelCard
from sfllm_scheduler.core.requests import Key, Request


class InvariantError(AssertionError):
    """The tables contradict each other: a bug, never something that a peer can cause."""


class HoldKey(NamedTuple):
    """Names one attempt on a worker."""

    key: Key
    attempt: int


class Hold:
    """Room that a request takes on a worker, until the last of its open choices has ended.

    `asked` is how many lists the worker had been asked for when this was granted.
    """

    __slots__ = ("asked", "kv_tokens", "request", "slots")

    def __init__(self, request: Request, slots: int, kv_tokens: int, asked: int) -> None:
        self.request = request
        self.slots = slots
        self.kv_tokens = kv_tokens
        self.asked = asked


class Trial(NamedTuple):
    """A suspect on a worker: its group's size, since when it is here, and how long each choice must get."""

    group_size: int
    since: float
    goals: dict[int, int]


class Worker:
    """A worker, its lease and what it holds. `heard` is when it was last heard of, `joined` its welcome.

    `digest` is of the choices that it should hold; `asked` counts the lists that it was asked for,
    and `answered` is the number of the last one that came. `probation` has its suspects that are not
    cleared, and `reserved` is the suspect that it is kept free for (`suspects.py`).
    """

    def __init__(self, peer: bytes, worker_id: str, card: ModelCard, capacity: Capacity, now: float) -> None:
        self.peer = peer
        self.worker_id = worker_id
        self.card = card
        self.capacity = capacity
        self.lease = 0
        self.joined = now
        self.heard = now
        self.draining = False
        self.holds: dict[HoldKey, Hold] = {}
        self.used_slots = 0
        self.used_kv_tokens = 0
        self.digest = 0
        self.asked = 0
        self.answered = 0
        self.probation: dict[HoldKey, Trial] = {}
        self.reserved: Request | None = None
        self.reserved_since = 0.0

    @property
    def free_slots(self) -> int:
        """Sequences that it could take now."""
        return self.capacity.slots - self.used_slots

    @property
    def free_kv_tokens(self) -> int:
        """Cache tokens that are not set aside."""
        return self.capacity.kv_tokens - self.used_kv_tokens

    @property
    def has_room(self) -> bool:
        """Whether anything could fit at all."""
        return self.free_slots > 0 and self.free_kv_tokens > 0

    @property
    def takes_anybody(self) -> bool:
        """Whether it is neither on trial with suspects nor kept free for one."""
        return not self.probation and self.reserved is None

    @property
    def load(self) -> tuple[float, int]:
        """How busy it is: the share of its sequences in use, then the least free cache."""
        return self.used_slots / self.capacity.slots, -self.free_kv_tokens

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

    def hold(self, request: Request, now: float) -> None:
        """Take the credits of a request that is about to be granted."""
        hold = Hold(request, self.slots_for(request), self.charge(request), self.asked)
        key = HoldKey(request.key, request.submit.attempt)
        self.holds[key] = hold
        if request.suspects:
            counts = zip(request.submit.choices, request.submit.generated_counts, strict=True)
            goals = {choice: count + PROBATION_TOKENS for choice, count in counts}
            self.probation[key] = Trial(request.suspects, now, goals)
        request.worker = self.peer
        self.used_slots += hold.slots
        self.used_kv_tokens += hold.kv_tokens
        self.digest = reduce(xor, request.open.values(), self.digest)
        if self.free_slots < 0 or self.free_kv_tokens < 0:
            raise InvariantError(f"worker {self.worker_id} was granted more than it has room for")

    def release(self, key: HoldKey) -> Hold:
        """Give back the credits of a request that ended here."""
        hold = self.holds.pop(key)
        self.probation.pop(key, None)
        self.used_slots -= hold.slots
        self.used_kv_tokens -= hold.kv_tokens
        self.digest = reduce(xor, hold.request.open.values(), self.digest)
        return hold
