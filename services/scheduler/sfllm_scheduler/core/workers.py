"""A worker as the scheduler sees it: its lease, what it holds, and the credits that this takes."""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from sfllm.messages import PROBATION_TOKENS, Capacity, ModelCard
from sfllm_scheduler.core.prefill import OutstandingPrefill
from sfllm_scheduler.core.requests import Key, Request
from sfllm_scheduler.core.speed import Speed

PREFILL_WINDOW_STEPS = 2
"""A worker gets requests while it has less prefill than for so many steps: its next step is always filled,
and the queue stays here, where the order can still change."""

MAX_SLOTS = 2**16


class InvariantError(AssertionError):
    """The tables contradict each other: a bug, never something that a peer can cause."""


class HoldKey(NamedTuple):
    """Names one attempt on a worker."""

    key: Key
    attempt: int


class Hold:
    """Room that a request takes on a worker, until the last of its open choices has ended.

    `asked` is how many lists the worker had been asked for when this was granted, `grant` the number of
    the grant, `prefill_tokens` what it was charged for prefill. `recalled` says that it was asked back.
    """

    __slots__ = ("asked", "grant", "kv_tokens", "prefill_tokens", "recalled", "request", "slots")

    def __init__(
        self, request: Request, slots: int, kv_tokens: int, asked: int, grant: int, prefill_tokens: int
    ) -> None:
        self.request = request
        self.slots = slots
        self.kv_tokens = kv_tokens
        self.asked = asked
        self.grant = grant
        self.prefill_tokens = prefill_tokens
        self.recalled = False


class Trial(NamedTuple):
    """A suspect on a worker: its group's size, since when it is here, and how long each choice must get."""

    group_size: int
    since: float
    goals: dict[int, int]


class Worker:
    """A worker, its lease and what it holds. `heard` is when it was last heard of, `joined` its welcome.

    `digest` is of the choices that it should hold; `asked` counts the lists that it was asked for,
    and `answered` is the number of the last one that came. `probation` has its suspects that are not
    cleared, and `reserved` is the suspect that it is kept free for (`suspects.py`). `prefill` is what it
    has to prefill, `speed` how fast it is. Contexts that it could run are shorter than `context_limit`.
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
        self.prefill = OutstandingPrefill()
        self.prefill_window = PREFILL_WINDOW_STEPS * capacity.step_tokens
        self.context_limit = min(capacity.kv_tokens, card.max_model_len)
        self.speed = Speed.unknown(capacity)
        self._step_curve: tuple[float, ...] = ()
        self.asked = 0
        self.answered = 0
        self.probation: dict[HoldKey, Trial] = {}
        self.reserved: Request | None = None
        self.reserved_since = 0.0

    @property
    def free_slots(self) -> int:
        """Sequences that it could take now."""
        return max(0, self.capacity.slots - self.used_slots)

    @property
    def free_kv_tokens(self) -> int:
        """Cache tokens that are not set aside."""
        return self.capacity.kv_tokens - self.used_kv_tokens

    @property
    def is_ready(self) -> bool:
        """Whether some request may go to it.

        It has a slot, some cache and less to prefill than its window, and it is not leaving, on trial or kept
        free for a suspect.
        """
        capacity = self.capacity
        return (
            self.used_slots < capacity.slots
            and self.prefill.tokens < self.prefill_window
            and self.used_kv_tokens < capacity.kv_tokens
            and not self.draining
            and not self.probation
            and self.reserved is None
        )

    @property
    def load(self) -> float:
        """How busy it is, in seconds (`speed.py`)."""
        return self.speed.load(self.prefill.tokens, self.used_slots, self.used_kv_tokens)

    def follow(self, slots: int, step_curve: tuple[float, ...]) -> None:
        """It has beaten: it takes so many sequences now (0 for as many as before), and runs so fast.

        It may take fewer than it holds; then it gets nothing until enough have ended.
        """
        slots = min(slots, MAX_SLOTS)
        if slots in (0, self.capacity.slots) and step_curve == self._step_curve:
            return
        self._step_curve = step_curve
        if slots > 0 and slots != self.capacity.slots:
            self.capacity = replace(self.capacity, slots=slots)
            for hold in self.holds.values():
                hold.slots = self.slots_for(hold.request)
            self.used_slots = sum(hold.slots for hold in self.holds.values())
        self.speed = Speed.measured(step_curve, self.capacity) or Speed.unknown(self.capacity)

    def can_ever_run(self, request: Request) -> bool:
        """Whether it could run this waiting request when it held nothing else."""
        return request.longest < self.context_limit

    def slots_for(self, request: Request) -> int:
        """Sequences to set aside for it here; one with more choices runs them in several rounds."""
        return min(request.slots, self.capacity.slots)

    def charge(self, request: Request) -> int:
        """Cache to set aside for it here; one larger than the worker gets all of it, alone."""
        return min(request.kv_tokens, self.capacity.kv_tokens)

    def prefill_charge(self, uncached: int) -> int:
        """What a request with so many uncached tokens counts of the window: one step's, if it is longer.

        The worker computes short prompts beside a long one.
        """
        return max(1, min(uncached, self.capacity.step_tokens))

    def hold(self, request: Request, grant: int, uncached: int, now: float) -> None:
        """Take the credits of a request that is about to be granted; `uncached` is what its cache lacks."""
        tokens = self.prefill_charge(uncached)
        hold = Hold(request, self.slots_for(request), self.charge(request), self.asked, grant, tokens)
        key = HoldKey(request.key, request.submit.attempt)
        self.holds[key] = hold
        if request.suspects:
            counts = zip(request.submit.choices, request.submit.generated_counts, strict=True)
            goals = {choice: count + PROBATION_TOKENS for choice, count in counts}
            self.probation[key] = Trial(request.suspects, now, goals)
        request.worker = self.peer
        self.used_slots += hold.slots
        self.used_kv_tokens += hold.kv_tokens
        self.prefill.charge(grant, tokens)
        self.digest ^= request.mark
        if self.used_slots > self.capacity.slots or self.free_kv_tokens < 0:
            raise InvariantError(f"worker {self.worker_id} was granted more than it has room for")

    def release(self, key: HoldKey) -> Hold:
        """Give back the credits of a request that ended here."""
        hold = self.holds.pop(key)
        self.probation.pop(key, None)
        self.used_slots -= hold.slots
        self.used_kv_tokens -= hold.kv_tokens
        self.prefill.discharge(hold.grant, hold.prefill_tokens)
        self.digest ^= hold.request.mark
        return hold
