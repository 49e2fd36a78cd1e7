"""What runs in the next step: pure planning over sequences and block numbers.

Every running sequence that has one token left to compute decodes; the rest of the
step's token budget goes to prefill, in chunks, oldest first, and then to admissions. With `shortest_first`
half of it is for the oldest prompt and half for much shorter ones, so that none waits behind a long one.
When a decode finds no free block, the youngest running sequence is preempted: its
blocks are freed and it is computed again later (recompute, as in vLLM, SOSP 2023).
A sequence whose prompt begins like one that is being computed waits for those blocks.

A step may be planned while earlier ones are in flight: launched and not read. Their tokens count as
there (`Sequence.unread`), their blocks are not free, and nobody is preempted until they were read.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from sfllm.batch_sizing import BatchSizing
from sfllm_worker.engine.prefixes import Prefixes
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.kv.block_pool import BlockPool

MOST_REPORTED = 256
"""Prompt tokens of a step whose log probabilities are wanted. Each takes a row of logits, which for a large
vocabulary is most of a megabyte: without a bound a step of many tokens would want gigabytes."""


class Limits(NamedTuple):
    """Bounds of a step: sequences in it, tokens in it, tokens in a block."""

    max_sequences: int
    max_step_tokens: int
    block_size: int


class Row(NamedTuple):
    """`num_tokens` tokens of `sequence` from token `start` on, which is the first not computed yet.

    `completes`: all its tokens are computed after this step, so that the next can be sampled.
    """

    sequence: Sequence
    num_tokens: int
    start: int
    completes: bool


class StepPlan:
    """One step: rows of one token first, and block copies (source, target) to make before it.

    `lacks_blocks`: a decode found no block, and steps that are in flight must be read before it is known
    whether someone has to be preempted for it. `reported`: prompt tokens whose log
    probabilities are wanted.
    """

    __slots__ = ("admitted", "copies", "lacks_blocks", "preempted", "reported", "rows")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.copies: list[tuple[int, int]] = []
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.lacks_blocks = False
        self.reported = 0


class Planner:
    """Owner of the waiting queue, the running list and the blocks of every sequence.

    Invariants: a sequence is in exactly one of the two; a waiting one has no blocks; `running`
    is in admission order, oldest first; the slots of all running ones fit `max_sequences`. Steps are
    numbered from 1, launched one after the other and settled in the same order. Among `_begun` are all
    running sequences with a prompt that is not computed yet.
    """

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        if limits.max_step_tokens < limits.max_sequences:
            raise ValueError("a step must have room for one token of every sequence")
        self.limits = limits
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prefixes = Prefixes(pool, limits.block_size)
        self.shortest_first = False
        self.sizing: BatchSizing | None = None
        self._begun: list[Sequence] = []
        self._slots_used = 0
        self._launched = self._settled = 0

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence to advance, or a step in flight."""
        return bool(self.running or self.waiting) or self._settled < self._launched

    @property
    def slots(self) -> int:
        """How many sequences may run together now."""
        return self.limits.max_sequences if self.sizing is None else self.sizing.sequences

    @property
    def pending_tokens(self) -> int:
        """Uncached tokens to compute before sequences can go on, of one at most a step's worth."""
        most, block_size = self.limits.max_step_tokens, self.limits.block_size
        running = sum(
            min(each.remaining, most) for each in self._begun if each.block_table and each.remaining > 1
        )
        return running + sum(
            min(len(each.tokens) - self.prefixes.count_known(each) * block_size, most)
            for each in self.waiting
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller has made sure that it fits the cache when it is alone."""
        self.waiting.append(sequence)

    def fork(self, parent: Sequence, choice: int) -> Sequence:
        """Branch `choice` off a running sequence; they share blocks until one of them writes."""
        child = parent.fork(choice)
        self.pool.share(child.block_table)
        self.running.append(child)
        parent.fork_choices = tuple(other for other in parent.fork_choices if other != choice)
        return child

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is and free its blocks."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    def drop_fork(self, sequence: Sequence, choice: int) -> None:
        """A choice that has not branched off yet is no longer wanted."""
        kept = tuple(other for other in sequence.fork_choices if other != choice)
        if sequence in self.running:
            self._slots_used -= len(sequence.fork_choices) - len(kept)
        sequence.fork_choices = kept

    def plan(self) -> StepPlan:
        """Plan the next step, allocating the blocks that it writes to.

        There is always something to do for someone while no step is in flight. While one is, nobody goes
        on if someone's tokens must be read first: taking turns would halve the batches.
        """
        plan = StepPlan()
        if self._settled < self._launched and any(map(_needs_reading, self.running)):
            return plan
        prefilling = []
        for sequence in list(self.running):
            if sequence.remaining > 1:
                prefilling.append(sequence)
            elif sequence not in plan.preempted and not (sequence.unread and _is_at_its_end(sequence)):
                self._plan_decode(sequence, plan)
        num_decodes = len(plan.rows)
        budget = self._prefill_budget(plan)
        may_admit = not plan.preempted and not plan.lacks_blocks
        prefilling = [sequence for sequence in prefilling if sequence not in plan.preempted]
        if self.shortest_first:
            self._plan_shared(prefilling, budget, may_admit, plan)
        else:
            self._plan_in_order(prefilling, budget, may_admit, plan)
        self._begun = [*prefilling, *plan.admitted]
        if len(plan.rows) > num_decodes:
            plan.rows.sort(key=lambda row: row.num_tokens > 1)
        return plan

    def launch(self, plan: StepPlan) -> None:
        """The planned step was launched: whatever is launched later finds its tokens in the cache."""
        self._launched += 1
        for sequence, num_tokens, start, _ in plan.rows:
            sequence.computed = start + num_tokens
            sequence.last_step = self._launched

    def settle(self, plan: StepPlan) -> None:
        """The oldest step in flight was read, and is `plan`: full blocks can be found in the cache.

        The tokens that were chosen in it are not part of their sequences yet, those before it are.
        """
        self._settled += 1
        block_size = self.limits.block_size
        for sequence, num_tokens, start, _ in plan.rows:
            if start // block_size != (start + num_tokens) // block_size and sequence.block_table:
                self.prefixes.publish(sequence, start, start + num_tokens)
        self.pool.settle(self._settled)

    def spoil(self, sequence: Sequence) -> list[int]:
        """What a running sequence computed is no good: nobody may find it. Blocks that only it has."""
        self.pool.unpublish(sequence.block_table)
        return [block for block in sequence.block_table if not self.pool.is_shared(block)]

    def _plan_decode(self, sequence: Sequence, plan: StepPlan) -> None:
        if not self._can_write_in_place(sequence) and not self._make_writable(sequence, plan):
            return
        plan.rows.append(Row(sequence, 1, sequence.computed, True))

    def _can_write_in_place(self, sequence: Sequence) -> bool:
        """Whether the last block has room for the next token and is nobody else's."""
        table = sequence.block_table
        return sequence.computed < len(table) * self.limits.block_size and not self.pool.is_shared(table[-1])

    def _make_writable(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Get the block that the next token goes to, by preempting if need be.

        False if it hit itself, or if it has to wait for steps in flight.
        """
        while self.pool.num_free == 0 and not self._can_write_in_place(sequence):
            if self._settled < self._launched:
                plan.lacks_blocks = True
                return False
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        position = sequence.computed
        table = sequence.block_table
        if position == len(table) * self.limits.block_size:
            table.extend(self.pool.allocate(1))
        elif self.pool.is_shared(table[-1]):
            (copy,) = self.pool.allocate(1)
            plan.copies.append((table[-1], copy))
            self.pool.release([table[-1]], self._launched + 1)  # this step copies it
            table[-1] = copy
        return True

    def _prefill_budget(self, plan: StepPlan) -> int:
        """Prompt tokens that the step has room for beside the decodes that it has already."""
        budget = self.limits.max_step_tokens - len(plan.rows)
        if self.sizing is None or budget < 1:
            return budget
        return self.sizing.prefill_tokens(budget, len(plan.rows), sum(row.start + 1 for row in plan.rows))

    def _plan_in_order(
        self, prefilling: list[Sequence], budget: int, may_admit: bool, plan: StepPlan
    ) -> None:
        for sequence in prefilling:
            if budget > 0:
                budget -= self._plan_chunk(sequence, budget, plan)
        while budget > 0 and may_admit and self._admit_next(plan):
            budget -= self._plan_chunk(plan.admitted[-1], budget, plan)

    def _plan_shared(self, prefilling: list[Sequence], budget: int, may_admit: bool, plan: StepPlan) -> None:
        """Half for the oldest, half for prompts of which less than half as much is left, shortest first.

        What these leave over goes by arrival: prompts of like length one after the other, not all at once.
        """
        prompts = [*prefilling]
        # Of the oldest one at most half a step is counted, so that there is something for the other half.
        left = sum(each.remaining for each in prompts)
        over = max(0, prompts[0].remaining - (budget - budget // 2)) if prompts else 0
        while may_admit and left - over < budget and self._admit_next(plan):
            admitted = plan.admitted[-1]
            left += admitted.remaining
            if not prompts:
                over = max(0, admitted.remaining - (budget - budget // 2))
            prompts.append(admitted)
        if not prompts or budget < 1:
            return
        oldest = prompts[0]
        counts = {oldest: min(oldest.remaining, budget - budget // 2)}
        budget -= counts[oldest]
        short = [each for each in prompts if each.remaining * 2 <= oldest.remaining]
        for sequence in [*sorted(short, key=lambda each: each.remaining), *prompts]:
            before = counts.get(sequence, 0)
            count = min(sequence.remaining - before, budget)
            if count > 0:
                counts[sequence] = before + count
                budget -= count
        for sequence in prompts:
            if sequence in counts:
                self._plan_chunk(sequence, counts[sequence], plan)

    def _plan_chunk(self, sequence: Sequence, budget: int, plan: StepPlan) -> int:
        remaining = sequence.remaining
        count = min(remaining, budget)
        if sequence.sampling.prompt_logprobs >= 0 and sequence.reported_prompt < sequence.prompt_count:
            count = min(count, MOST_REPORTED - plan.reported)
            if count == 0:
                return 0  # it comes with the next step
            plan.reported += count
        plan.rows.append(Row(sequence, count, sequence.computed, count == remaining))
        return count

    def _admit_next(self, plan: StepPlan) -> bool:
        """Admit the first waiting sequence that does not wait for another's blocks, if it has room."""
        for sequence in self.waiting:
            cached = self.prefixes.find(sequence)
            if self.prefixes.leader_of(sequence, cached) is not None:
                continue
            if not self._has_room(sequence, cached):
                return False
            self.waiting.remove(sequence)
            self._admit(sequence, cached)
            plan.admitted.append(sequence)
            return True
        return False

    def _blocks_to_allocate(self, sequence: Sequence, cached: list[int]) -> int:
        return -(-len(sequence.tokens) // self.limits.block_size) - len(cached)

    def _has_room(self, sequence: Sequence, cached: list[int]) -> bool:
        free = self.pool.num_free - self.pool.num_free_among(cached)
        # One that has more choices than are to run together now still has its turn, alone.
        slots = self.limits.max_sequences if not self._slots_used else self.slots
        return (
            self._slots_used + sequence.slots <= slots and self._blocks_to_allocate(sequence, cached) <= free
        )

    def _admit(self, sequence: Sequence, cached: list[int]) -> None:
        self.pool.share(cached)
        sequence.block_table = cached + self.pool.allocate(self._blocks_to_allocate(sequence, cached))
        sequence.computed = len(cached) * self.limits.block_size
        self.running.append(sequence)
        self._slots_used += sequence.slots
        self.prefixes.admitted(sequence, cached)

    def _preempt(self, sequence: Sequence, plan: StepPlan) -> None:
        self._stop(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        plan.preempted.append(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.prefixes.stopped(sequence)
        self.running.remove(sequence)
        self._slots_used -= sequence.slots
        self.pool.release(sequence.block_table, sequence.last_step)
        sequence.block_table = []

    def check_integrity(self) -> None:
        """Raise AssertionError unless the invariants hold."""
        self.pool.check_integrity()
        self.prefixes.check_integrity(self.running)
        assert self._slots_used == sum(sequence.slots for sequence in self.running)
        assert self._slots_used <= self.limits.max_sequences
        assert not any(sequence.block_table for sequence in self.waiting)
        for sequence in self.running:
            assert sequence.block_table
            assert 0 <= sequence.computed < len(sequence.tokens) + sequence.unread
            assert len(sequence.block_table) * self.limits.block_size >= sequence.computed
        if self._settled == self._launched:
            assert self.pool.num_deferred == 0, "blocks wait for steps that were all read"
            assert not any(sequence.unread for sequence in (*self.running, *self.waiting))
        if not self.running:
            idle = self.pool.num_free + self.pool.num_deferred
            assert idle == self.pool.num_blocks, "blocks are held by nobody"


def _needs_reading(sequence: Sequence) -> bool:
    """Whether its next token cannot be chosen because there are some that nobody has read."""
    return sequence.needs_its_tokens and sequence.unread > 0


def _is_at_its_end(sequence: Sequence) -> bool:
    """Whether the newest of its unread tokens is its last, or the one with which its choices branch off."""
    return len(sequence.tokens) + sequence.unread >= sequence.length_limit or bool(sequence.fork_choices)
