"""A worker's steps: chunked prefill, decode, cache, preemption, over a curve instead of a model.

What `sfllm_worker.engine.planner` does with tensors behind it, with counts in place of blocks. Steps
that only decode are alike until somebody ends, so a run of them is one event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from sfllm.prefixes import CHUNK_TOKENS
from sfllm_cli.simulate.prefix_cache import PrefixCache
from sfllm_cli.simulate.profiles import BLOCK_TOKENS, Profile

LEAST_PREFILL_TOKENS = 32
"""A step takes in so many prompt tokens whatever the target: prefill always gets on."""


class Work:
    """One request on a worker. `prompt` counts the tokens to compute first, those of lost attempts included.

    `left` is what of it is not computed, `outputs` how many tokens are to come, `got` how many came before it
    last began to decode, `context` what it has in the cache, `own` what of that no other sequence shares.
    `ends_at` is the number of the worker's step that gives its last token, -1 while it does not decode.
    """

    __slots__ = (
        "attempt",
        "context",
        "ends_at",
        "got",
        "key",
        "left",
        "names",
        "outputs",
        "own",
        "prompt",
        "shared",
    )

    def __init__(
        self, key: tuple[int, int], attempt: int, prompt: int, outputs: int, names: Sequence[int]
    ) -> None:
        self.key = key
        self.attempt = attempt
        self.prompt = self.left = prompt
        self.outputs = outputs
        self.names = names
        self.context = self.own = self.shared = self.got = 0
        self.ends_at = -1


class Plan(NamedTuple):
    """`steps` equal steps of `rows` decodes, or one step with `chunks` of prefill beside them."""

    steps: int
    rows: int
    chunks: list[tuple[Work, int]]
    seconds: float


class ModelledEngine:
    """Owner of a worker's sequences: waiting, being prefilled, decoding.

    Invariant: the tokens of all sequences and of the prefix cache fit `kv_tokens`.
    """

    def __init__(self, profile: Profile, slowness: float = 1.0) -> None:
        self.slowness = slowness
        self.shortest_first = False
        self.prefixes = PrefixCache()
        self.preempted = 0
        self.steps = 0
        self._profile = profile
        self._curve = profile.curve
        self._waiting: deque[Work] = deque()
        self._prefilling: list[Work] = []
        self._decoding: dict[tuple[int, int], Work] = {}
        self._ends: list[tuple[int, tuple[int, int], Work]] = []
        self._context = 0
        self._own = 0

    @property
    def running(self) -> int:
        """Sequences that have room in the cache."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        """Sequences that have none yet."""
        return len(self._waiting)

    @property
    def free_tokens(self) -> int:
        """Room in the cache that is used by nobody, or by nobody now."""
        return self._profile.kv_tokens - self._own - self.prefixes.tokens + self.prefixes.idle_tokens

    @property
    def pending_tokens(self) -> int:
        """What is left to prefill, of a long prompt one step's budget."""
        most = self._profile.step_tokens
        return sum(min(work.left, most) for work in self._prefilling) + sum(
            min(work.left - CHUNK_TOKENS * self.prefixes.longest(work.names), most) for work in self._waiting
        )

    def add(self, work: Work) -> None:
        """Take a request."""
        self._waiting.append(work)

    def remove(self, key: tuple[int, int], *, unless_begun: bool = False) -> bool:
        """Forget a request wherever it is; whether it was here, and had not begun if that matters."""
        for work in self._waiting:
            if work.key == key:
                self._waiting.remove(work)
                return True
        if unless_begun:
            return False
        for work in [*self._prefilling, *self._decoding.values()]:
            if work.key == key:
                self._stop(work)
                return True
        return False

    def plan(self) -> Plan | None:
        """The next step, or a run of equal ones; None when there is nothing to do."""
        self._make_room_to_decode()
        rows = len(self._decoding)
        chunks = self._chunks(self._prefill_budget(rows))
        if chunks:
            tokens = sum(count for _, count in chunks)
            return Plan(1, rows, chunks, self._curve.seconds(tokens, rows, self._context) * self.slowness)
        if not rows:
            return None
        while self._ends[0][2].ends_at != self._ends[0][0]:
            heappop(self._ends)  # it was preempted or cancelled since
        steps = max(1, min(self._ends[0][0] - self.steps, self.free_tokens // rows))
        return Plan(steps, rows, [], self.seconds(rows, steps))

    def _prefill_budget(self, rows: int) -> int:
        """Prompt tokens in the next step; so few beside decodes that the target for their time is kept."""
        budget = self._profile.step_tokens - rows
        target, each = self._profile.target_itl_seconds, self._curve.per_prefill_token
        if not rows or target is None or not each:
            return budget
        left = target / self.slowness - self._curve.seconds(0, rows, self._context)
        return max(min(budget, int(left / each)), LEAST_PREFILL_TOKENS)

    def seconds(self, rows: int, steps: int) -> float:
        """What so many of the next steps take that only decode: each adds a token to every context."""
        first = self._curve.seconds(0, rows, self._context)
        growth = self._curve.per_context_token * rows * steps * (steps - 1) / 2
        return (first * steps + growth) * self.slowness

    def complete(self, plan: Plan, steps: int) -> tuple[list[Work], list[Work]]:
        """So many steps of a plan are over: who has got a first token, and who its last."""
        self.steps += steps
        grown = plan.rows * steps
        self._context += grown
        self._take(grown)
        finished = list(self._finished())
        first = []
        for work, count in plan.chunks:
            work.left -= count
            work.context += count
            if not work.left:
                self._prefilling.remove(work)
                self._publish(work)
                first.append(work)
        for work in first:
            work.got += 1
            if work.got >= work.outputs:
                self._release(work)
                finished.append(work)
            else:
                self._decode(work)
        return first, finished

    def left_of(self, work: Work) -> int:
        """How many tokens a sequence has yet to get."""
        return work.outputs - work.got if work.ends_at < 0 else work.ends_at - self.steps

    def works(self) -> list[Work]:
        """Everything that is here."""
        return [*self._waiting, *self._prefilling, *self._decoding.values()]

    def _decode(self, work: Work) -> None:
        work.ends_at = self.steps + work.outputs - work.got
        self._decoding[work.key] = work
        self._context += work.context
        heappush(self._ends, (work.ends_at, work.key, work))

    def _finished(self) -> Iterator[Work]:
        while self._ends and self._ends[0][0] <= self.steps:
            ends_at, _, work = heappop(self._ends)
            if work.ends_at == ends_at:
                self._stop_decoding(work)
                self._release(work)
                yield work

    def _stop_decoding(self, work: Work) -> None:
        """Its context, and what it has in the cache for itself, have grown since it began to decode."""
        got = work.outputs - self.left_of(work)
        grown = got - work.got
        work.context += grown
        work.own += grown
        work.got = got
        work.ends_at = -1
        del self._decoding[work.key]
        self._context -= work.context

    def _stop(self, work: Work) -> None:
        if work.ends_at >= 0:
            self._stop_decoding(work)
        else:
            self._prefilling.remove(work)
        self._release(work)

    def _release(self, work: Work) -> None:
        self._own -= work.own
        self.prefixes.leave(work.names[: work.shared])
        work.own = work.shared = 0

    def _take(self, tokens: int) -> None:
        self._own += tokens
        over = self._own + self.prefixes.tokens - self._profile.kv_tokens
        if over > 0:
            self.prefixes.evict(over)

    def _make_room_to_decode(self) -> None:
        """Preempt the youngest while the next step has no room for everybody."""
        while len(self._decoding) > self.free_tokens:
            self.preempted += 1
            work = self._prefilling[-1] if self._prefilling else next(reversed(self._decoding.values()))
            self._stop(work)
            work.prompt = work.left = work.prompt + work.got
            work.outputs -= work.got
            work.context = work.got = 0
            self._waiting.appendleft(work)

    def _publish(self, work: Work) -> None:
        """A prompt is computed: others can share its beginnings."""
        rest = work.names[work.shared :]
        self.prefixes.use(rest)
        work.shared = len(work.names)
        shared = min(CHUNK_TOKENS * len(rest), work.own)
        work.own -= shared
        self._own -= shared
        self._take(0)

    def _chunks(self, budget: int) -> list[tuple[Work, int]]:
        if not self._prefilling and not self._waiting:
            return []
        if self.shortest_first:
            return self._shared_chunks(budget)
        chunks: list[tuple[Work, int]] = []
        for work in self._prefilling:
            if budget < 1:
                return chunks
            count = min(work.left, budget)
            chunks.append((work, count))
            budget -= count
        while budget > 0 and (admitted := self._admit()) is not None:
            count = min(admitted.left, budget)
            chunks.append((admitted, count))
            budget -= count
        return chunks

    def _shared_chunks(self, budget: int) -> list[tuple[Work, int]]:
        """Half for the oldest, half for those with less than half as much left, the rest by arrival."""
        while self._unfilled(budget) and self._admit() is not None:
            pass
        if not self._prefilling or budget < 1:
            return []
        counts: dict[tuple[int, int], int] = {}
        oldest = self._prefilling[0]
        short = sorted(
            (work for work in self._prefilling if work.left * 2 <= oldest.left), key=lambda work: work.left
        )
        everybody = [(work, budget) for work in (*short, *self._prefilling)]
        for work, most in [(oldest, budget - budget // 2), *everybody]:
            before = counts.get(work.key, 0)
            count = min(work.left - before, most, budget)
            if count > 0:
                counts[work.key] = before + count
                budget -= count
        return [(work, counts[work.key]) for work in self._prefilling if work.key in counts]

    def _unfilled(self, budget: int) -> bool:
        """Whether one more prompt would have a part of the step, of which the oldest takes half at most."""
        left = sum(work.left for work in self._prefilling[1:])
        return not self._prefilling or left + min(self._prefilling[0].left, budget - budget // 2) < budget

    def _admit(self) -> Work | None:
        """The next waiting request that has room and does not wait for another's beginning."""
        if not self._waiting or self.running >= self._profile.slots:
            return None
        for work in self._waiting:
            cached = self.prefixes.longest(work.names)
            if self._is_being_computed(work.names[cached : cached + 1]):
                continue
            needed = -(-(work.left - CHUNK_TOKENS * cached) // BLOCK_TOKENS) * BLOCK_TOKENS
            if needed > self.free_tokens - CHUNK_TOKENS * cached:
                return None
            self._waiting.remove(work)
            self.prefixes.use(work.names[:cached])
            work.shared = cached
            work.context = CHUNK_TOKENS * cached
            work.left -= work.context
            work.own = needed
            self._take(needed)
            self._prefilling.append(work)
            return work
        return None

    def _is_being_computed(self, name: Sequence[int]) -> bool:
        return bool(len(name)) and any(
            name[0] == other.names[other.shared]
            for other in self._prefilling
            if other.shared < len(other.names)
        )
