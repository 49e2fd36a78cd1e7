"""What runs in the next step: pure planning over sequences and block numbers.

Every running sequence that has one token left to compute decodes; the rest of the
step's token budget goes to prefill, in chunks, oldest first, and then to admissions.
When a decode finds no free block, the youngest running sequence is preempted: its
blocks are freed and it is computed again later (recompute, as in vLLM, SOSP 2023).
A sequence whose prompt begins like one that is being computed waits for those blocks.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from sfllm_worker.engine.prefixes import Prefixes
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.kv.block_pool import BlockPool


class Limits(NamedTuple):
    """Bounds of a step: sequences in it, tokens in it, tokens in a block."""

    max_sequences: int
    max_step_tokens: int
    block_size: int


class Row(NamedTuple):
    """`num_tokens` tokens of `sequence`, from its first token that is not computed yet."""

    sequence: Sequence
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether all its tokens are computed after this step, so that the next can be sampled."""
        return self.num_tokens == self.sequence.remaining


class StepPlan(NamedTuple):
    """One step: rows of one token first, and block copies (source, target) to make before it."""

    rows: list[Row]
    copies: list[tuple[int, int]]
    admitted: list[Sequence]
    preempted: list[Sequence]


class Planner:
    """Owner of the waiting queue, the running list and the blocks of every sequence.

    Invariants: a sequence is in exactly one of the two; a waiting one has no blocks; `running`
    is in admission order, oldest first; the slots of all running ones fit `max_sequences`.
    """

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        if limits.max_step_tokens < limits.max_sequences:
            raise ValueError("a step must have room for one token of every sequence")
        self.limits = limits
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prefixes = Prefixes(pool, limits.block_size)
        self._slots_used = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.waiting)

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
        """Plan the next step, allocating the blocks that it writes to."""
        plan = StepPlan([], [], [], [])
        prefilling = []
        for sequence in list(self.running):
            if sequence.remaining > 1:
                prefilling.append(sequence)
            elif sequence not in plan.preempted:
                self._plan_decode(sequence, plan)
        num_decodes = len(plan.rows)
        budget = self.limits.max_step_tokens - num_decodes
        for sequence in prefilling:
            if budget > 0 and sequence not in plan.preempted:
                budget -= self._plan_chunk(sequence, budget, plan)
        while budget > 0 and not plan.preempted and self._admit_next(plan):
            budget -= self._plan_chunk(plan.admitted[-1], budget, plan)
        if len(plan.rows) > num_decodes:
            plan.rows.sort(key=lambda row: row.num_tokens > 1)
        return plan

    def commit(self, plan: StepPlan) -> None:
        """The planned step ran: its tokens are in the cache, and full blocks can be found there."""
        for sequence, num_tokens in plan.rows:
            before = sequence.computed
            sequence.computed += num_tokens
            self.prefixes.publish(sequence, before)

    def spoil(self, sequence: Sequence) -> list[int]:
        """What a running sequence computed is no good: nobody may find it. Blocks that only it has."""
        self.pool.unpublish(sequence.block_table)
        return [block for block in sequence.block_table if not self.pool.is_shared(block)]

    def _plan_decode(self, sequence: Sequence, plan: StepPlan) -> None:
        if not self._can_write_in_place(sequence) and not self._make_writable(sequence, plan):
            return
        plan.rows.append(Row(sequence, 1))

    def _can_write_in_place(self, sequence: Sequence) -> bool:
        """Whether the last block has room for the next token and is nobody else's."""
        table = sequence.block_table
        return sequence.computed < len(table) * self.limits.block_size and not self.pool.is_shared(table[-1])

    def _make_writable(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Get the block that the next token goes to, by preempting if need be; False if it hit itself."""
        while self.pool.num_free == 0 and not self._can_write_in_place(sequence):
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
            self.pool.release([table[-1]])
            table[-1] = copy
        return True

    def _plan_chunk(self, sequence: Sequence, budget: int, plan: StepPlan) -> int:
        count = min(sequence.remaining, budget)
        plan.rows.append(Row(sequence, count))
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
        return (
            self._slots_used + sequence.slots <= self.limits.max_sequences
            and self._blocks_to_allocate(sequence, cached) <= free
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
        self.pool.release(sequence.block_table)
        sequence.block_table = []

    def check_integrity(self) -> None:
        """Raise AssertionError unless the invariants hold."""
        self.pool.check_integrity()
        self.prefixes.check_integrity(self.running)
        assert self._slots_used == sum(sequence.slots for sequence in self.running)
        assert self._slots_used <= self.limits.max_sequences
        assert not any(sequence.block_table for sequence in self.waiting)
        for sequence in self.running:
            assert 0 <= sequence.computed < len(sequence.tokens)
            assert len(sequence.block_table) * self.limits.block_size >= sequence.computed
        if not self.running:
            assert self.pool.num_free == self.pool.num_blocks, "blocks are held by nobody"
