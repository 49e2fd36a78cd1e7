"""A worker's steps: chunked prefill, decode, cache, preemption, over a curve instead of a model.

What `sfllm_worker.engine.planner` does with tensors behind it, with counts in place of blocks
(`blocks.py`). Steps that only decode are alike until somebody ends, so a run of them is one event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from operator import attrgetter

from sfllm.batch_sizing import BatchSizing
from sfllm.prefixes import CHUNK_TOKENS
from sfllm.step_curve import StepCurve
from sfllm_cli.simulate.blocks import Blocks
from sfllm_cli.simulate.profiles import Profile
from sfllm_cli.simulate.sharing import has_room, share_out
from sfllm_cli.simulate.work import Key, Plan, Work

_turn = attrgetter("turn")


class ModelledEngine:
    """Owner of a worker's sequences: waiting, being prefilled (in the order of admission), decoding."""

    def __init__(self, profile: Profile) -> None:
        self.shortest_first = False
        self.blocks = Blocks(profile.kv_blocks, profile.block_size)
        self.sizing: BatchSizing | None = None
        if profile.target_itl_seconds is not None:
            self.sizing = BatchSizing(profile.target_itl_seconds, profile.slots)
        self.preempted = 0
        self.queried_tokens = self.hit_tokens = 0
        self.steps = 0
        self._profile = profile
        self._take(profile.curve)
        self._waiting: deque[Work] = deque()
        self._prefilling: list[Work] = []
        self._decoding: dict[Key, Work] = {}
        self._ends: list[tuple[int, Key, int, Work]] = []
        self._context = 0
        self._turn = 0

    @property
    def curve(self) -> StepCurve:
        """What its steps take now."""
        return self._curve

    @property
    def slots(self) -> int:
        """How many sequences may run together now."""
        return self._profile.slots if self.sizing is None else self.sizing.sequences

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
        return self.blocks.size * self.blocks.free

    @property
    def pending_tokens(self) -> int:
        """What is left to prefill, of a long prompt one step's budget."""
        most = self._profile.step_tokens
        return sum(min(work.left, most) for work in self._prefilling) + sum(
            min(work.left - CHUNK_TOKENS * self._known(work), most) for work in self._waiting
        )

    def slow_down(self, factor: float) -> None:
        """From its next step on it takes so many times what the profile says."""
        self._take(StepCurve(*(part * factor for part in self._profile.curve)))

    def follow(self) -> None:
        """Size batches by what steps take now, as a worker does with every beat."""
        if self.running and self.sizing is not None:
            context = self._context + sum(work.context for work in self._prefilling)
            self.sizing.follow(self._curve, context / self.running)

    def add(self, work: Work) -> None:
        """Take a request."""
        self._waiting.append(work)

    def find(self, key: Key) -> Work | None:
        """The request of that name."""
        found = self._decoding.get(key)
        return found or next((work for work in (*self._prefilling, *self._waiting) if work.key == key), None)

    def remove(self, work: Work) -> None:
        """Forget a request wherever it is; not while a step with it is under way."""
        if work in self._waiting:
            self._waiting.remove(work)
        else:
            self._stop(work)

    def plan(self) -> Plan | None:
        """The next step, or a run of equal ones; None when there is nothing to do."""
        preempted = self._make_room_to_decode()
        rows = len(self._decoding)
        if self._prefilling or self._waiting:
            budget, admitted = self._prefill_budget(rows), []
            while not preempted and self._has_room(budget) and (work := self._admit()) is not None:
                admitted.append(work)
            if chunks := share_out(self._prefilling, budget, shortest_first=self.shortest_first):
                tokens = sum(count for _, count in chunks)
                seconds = self._curve.seconds(tokens, rows, self._context)
                return Plan(1, rows, chunks, admitted, seconds)
        if not rows:
            return None
        while self._ends[0][3].ends_at != self._ends[0][0]:
            heappop(self._ends)  # it was preempted or cancelled since
        steps = self.blocks.steps_that_fit(self.steps, self._ends[0][0] - self.steps)
        return Plan(steps, rows, [], [], self.seconds(rows, steps))

    def seconds(self, rows: int, steps: int) -> float:
        """What so many of the next steps take that only decode: each adds a token to every context."""
        first = self._curve.seconds(0, rows, self._context)
        growth = self._curve.per_context_token * rows * steps * (steps - 1) / 2
        return first * steps + growth

    def complete(self, plan: Plan, steps: int) -> tuple[list[Work], list[Work]]:
        """So many steps of a plan are over: who has got a first token, and who its last."""
        self.blocks.decoded(self.steps, steps)
        self.steps += steps
        self._context += plan.rows * steps
        finished = list(self._finished())
        first = []
        for work, count in plan.chunks:
            work.left -= count
            work.context += count
            self._publish(work)
            if not work.left:
                self._prefilling.remove(work)
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

    def check_integrity(self) -> None:
        """Raise AssertionError unless the counts are those of the sequences."""
        self.blocks.check_integrity()
        self.blocks.cache.check_integrity(work.names[: work.shared] for work in self.works())
        decoding = self._decoding.values()
        contexts = [work.context + work.outputs - work.got - self.left_of(work) for work in decoding]
        assert self._context == sum(contexts)
        own = sum(
            self.blocks.needed(context, work.shared) for work, context in zip(decoding, contexts, strict=True)
        )
        assert self.blocks.own == own + sum(map(self._blocks_of, self._prefilling))
        assert self.running <= self._profile.slots
        assert all(work.left > 0 for work in self._prefilling)

    def _prefill_budget(self, rows: int) -> int:
        """Prompt tokens in the next step; so few beside decodes that the target for their time is kept."""
        budget = self._profile.step_tokens - rows
        if budget < 1:
            return 0
        return budget if self.sizing is None else self.sizing.prefill_tokens(budget, rows, self._context)

    def _take(self, curve: StepCurve) -> None:
        """Steps take this; the worker knows it from the first one on, where a real one has to measure."""
        self._curve = curve
        if self.sizing is not None:
            self.sizing.curve = curve

    def _decode(self, work: Work) -> None:
        work.ends_at = self.steps + work.outputs - work.got
        self._decoding[work.key] = work
        self._context += work.context
        self.blocks.begin_decode(self.steps, work.context)
        heappush(self._ends, (work.ends_at, work.key, work.turn, work))

    def _finished(self) -> Iterator[Work]:
        while self._ends and self._ends[0][0] <= self.steps:
            ends_at, _, _, work = heappop(self._ends)
            if work.ends_at == ends_at:
                self._stop(work)
                yield work

    def _stop(self, work: Work) -> None:
        if work.ends_at < 0:
            self._prefilling.remove(work)
        else:
            got = work.outputs - self.left_of(work)
            work.context += got - work.got
            work.got = got
            work.ends_at = -1
            del self._decoding[work.key]
            self._context -= work.context
            self.blocks.end_decode(self.steps, work.context)
        self._release(work)

    def _release(self, work: Work) -> None:
        """Give its blocks back; beginnings stay in the cache until their room is needed."""
        self._publish(work)
        self.blocks.give(self._blocks_of(work), work.names[: work.shared])
        work.shared = 0

    def _blocks_of(self, work: Work) -> int:
        """Blocks that a running sequence has for itself; while it decodes, those of when it began to."""
        return self.blocks.needed(max(work.prompt, work.context), work.shared)

    def _make_room_to_decode(self) -> bool:
        """Preempt the youngest while the next step has no room for everybody; whether that had to be."""
        preempted = False
        while self.blocks.for_decode(self.steps, 1) > self.blocks.free:
            preempted = True
            self.preempted += 1
            work = max((*self._prefilling[-1:], *self._decoding.values()), key=_turn)
            self._stop(work)
            work.prompt = work.left = work.prompt + work.got
            work.outputs -= work.got
            work.context = work.got = 0
            self._waiting.appendleft(work)
        return preempted

    def _publish(self, work: Work) -> None:
        """What of its beginnings is computed others can share."""
        computed = min(work.context // CHUNK_TOKENS, len(work.names))
        if computed > work.shared:
            self.blocks.publish(work.names[work.shared : computed])
            work.shared = computed

    def _has_room(self, budget: int) -> bool:
        return bool(self._waiting) and has_room(self._prefilling, budget, shortest_first=self.shortest_first)

    def _admit(self) -> Work | None:
        """Admit the next waiting request that does not wait for another's beginning, if it has room."""
        slots = self.slots if self.running else self._profile.slots
        if self.running >= slots:
            return None
        reserved = self.blocks.for_decode(self.steps, 1)
        for work in self._waiting:
            usable = work.usable
            cached = self.blocks.cache.longest(usable)
            if self._leader_of(usable[cached : cached + 1]) is not None:
                continue
            found = usable[:cached]
            needed = self.blocks.needed(work.prompt, cached)
            if not self.blocks.fits(needed + reserved, found):
                return None
            self._start(work, found, needed)
            return work
        return None

    def _start(self, work: Work, found: Sequence[int], needed: int) -> None:
        self._waiting.remove(work)
        self.blocks.take(needed, found)
        work.shared = len(found)
        work.context = CHUNK_TOKENS * len(found)
        work.left = work.prompt - work.context
        if not work.begun:
            work.cached = work.context
            self.queried_tokens += work.prompt
            self.hit_tokens += work.cached
        self._turn += 1
        work.turn = self._turn
        self._prefilling.append(work)

    def _known(self, work: Work) -> int:
        """How many of its beginnings are in the cache or being computed."""
        usable = work.usable
        known = self.blocks.cache.longest(usable)
        leader = self._leader_of(usable[known : known + 1])
        if leader is not None:
            names = leader.prompt_names
            while known < min(len(usable), len(names)) and usable[known] == names[known]:
                known += 1
        return known

    def _leader_of(self, name: Sequence[int]) -> Work | None:
        """Who is computing the beginning of that name; nobody if there is none."""
        if not name:
            return None
        for work in self._prefilling:
            whole = min(work.prompt // CHUNK_TOKENS, len(work.names))  # what of its names is not its answer's
            if work.shared < whole and work.names[work.shared] == name[0]:
                return work
        return None
