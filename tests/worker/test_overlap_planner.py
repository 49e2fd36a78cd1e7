"""What is planned, and which blocks are free, while steps are in flight."""

from __future__ import annotations

import itertools

import torch

from sfllm.messages import Sampling
from sfllm_worker.engine.planner import Limits, Planner, StepPlan
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.kv.block_pool import BlockPool
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.sampler import choose_in_torch, sample

LIMITS = Limits(max_sequences=4, max_step_tokens=8, block_size=4)
NEXT_TOKEN = itertools.count()


def planner(blocks: int) -> Planner:
    return Planner(LIMITS, BlockPool(blocks + 1))


def added(p: Planner, tokens: list[int], forks: tuple[int, ...] = ()) -> Sequence:
    sequence = Sequence("r", 0, list(tokens), len(tokens), Sampling(max_tokens=100, seed=0), forks)
    p.add(sequence)
    return sequence


def launched(p: Planner) -> StepPlan:
    """Plan a step and launch it."""
    plan = p.plan()
    p.launch(plan)
    for row in plan.rows:
        row.sequence.unread += row.completes
    return plan


def read(p: Planner, plan: StepPlan) -> None:
    """Read the oldest step in flight, and give its sequences and those that branch off a token each."""
    p.settle(plan)
    for row in plan.rows:
        sequence = row.sequence
        if row.completes and sequence.block_table:
            sequence.unread -= 1
            for branch in [sequence, *(p.fork(sequence, choice) for choice in sequence.fork_choices)]:
                branch.tokens.append(next(NEXT_TOKEN))
    p.check_integrity()


def test_a_step_is_planned_as_if_every_sequence_of_the_one_before_went_on() -> None:
    p = planner(8)
    sequence = added(p, [1, 2, 3])
    first, second = launched(p), launched(p)
    assert [(row.start, row.num_tokens) for row in (*first.rows, *second.rows)] == [(0, 3), (3, 1)]
    read(p, first)
    read(p, second)
    assert len(sequence.tokens) == 5


def test_a_sequence_whose_choices_branch_off_waits_until_its_step_is_read() -> None:
    p = planner(8)
    added(p, [1, 2, 3], forks=(1,))
    first = launched(p)
    assert p.plan().rows == []
    read(p, first)
    assert len(p.plan().rows) == 2


def test_blocks_of_a_sequence_that_ends_in_flight_are_free_when_its_last_step_was_read() -> None:
    p = planner(8)
    sequence = added(p, list(range(7)))
    first, second = launched(p), launched(p)
    p.remove(sequence)
    assert (p.pool.num_free, p.pool.num_deferred) == (6, 2)
    read(p, first)
    assert (p.pool.num_free, p.pool.num_deferred) == (6, 2), "the second step writes to them"
    read(p, second)
    assert (p.pool.num_free, p.pool.num_deferred) == (8, 0)


def test_blocks_of_a_sequence_that_is_in_no_step_in_flight_are_free_at_once() -> None:
    p = planner(8)
    short, other = added(p, [1, 2]), added(p, [5, 6])
    first = launched(p)
    short.length_limit = 3
    launched(p)
    read(p, first)
    p.remove(short)
    assert p.pool.num_free == 7
    assert other in p.running


def test_what_waits_to_be_free_is_not_handed_out_but_can_be_found() -> None:
    p = planner(3)
    content = list(range(100, 109))
    sequence = added(p, content[:8])
    first = launched(p)
    read(p, first)
    second = launched(p)
    p.remove(sequence)
    assert p.pool.num_deferred == 3
    stranger = added(p, [1])
    assert p.plan().rows == [], "there is no block for it yet"
    p.remove(stranger)
    again = added(p, content[:5])
    plan = p.plan()
    assert plan.rows == [], "one block of its prefix is here, another one is not free"
    read(p, second)
    third = launched(p)
    assert [row.sequence for row in third.rows] == [again]
    assert again.cached_tokens == 4
    p.check_integrity()


def test_a_deferred_block_that_is_found_again_belongs_to_whoever_found_it() -> None:
    p = planner(4)
    content = list(range(100, 109))
    sequence = added(p, content[:8])
    read(p, launched(p))
    second = launched(p)
    p.remove(sequence)
    heir = added(p, content[:5])
    third = launched(p)
    assert heir.cached_tokens == 4
    assert p.pool.num_deferred == 2
    read(p, second)
    assert (p.pool.num_free, p.pool.num_deferred) == (2, 0)
    p.remove(heir)
    assert (p.pool.num_free, p.pool.num_deferred) == (2, 2)
    p.settle(third)
    assert p.pool.num_free == 4
    p.check_integrity()


def test_a_shared_block_is_free_when_the_last_step_of_all_its_sequences_was_read() -> None:
    for last_steps in ((1, 2), (2, 1), (0, 2), (2, 0)):
        pool = BlockPool(3)
        blocks = pool.allocate(2)
        pool.share(blocks)
        for last_step in last_steps:
            pool.release(blocks, last_step)
        pool.settle(1)
        assert (pool.num_free, pool.num_deferred) == (0, 2)
        pool.settle(2)
        assert pool.num_free == 2
        pool.check_integrity()


def test_a_prefix_is_found_when_the_step_that_computed_it_was_read() -> None:
    p = planner(8)
    added(p, list(range(200, 208)))
    first = launched(p)
    follower = added(p, list(range(200, 206)))
    launched(p)
    assert follower in p.waiting
    read(p, first)
    third = launched(p)
    assert follower.cached_tokens == 4
    assert follower in [row.sequence for row in third.rows]


def test_nobody_is_preempted_while_a_step_is_in_flight() -> None:
    p = planner(4)
    old, young = added(p, list(range(4))), added(p, list(range(10, 18)))
    before = launched(p)
    while not (plan := launched(p)).lacks_blocks:
        read(p, before)
        before = plan
    assert not plan.preempted
    assert old in p.running
    read(p, before)
    read(p, plan)
    assert p.plan().preempted == [young]


def test_the_source_of_a_copy_is_not_handed_out_before_the_copy_was_read() -> None:
    p = planner(4)
    parent = added(p, [1, 2], forks=(1, 2))
    read(p, launched(p))
    (source,) = parent.block_table
    copying = launched(p)
    assert [pair[0] for pair in copying.copies] == [source, source]
    holder = next(branch for branch in p.running if branch.block_table == [source])
    holder.last_step = 0  # as if it had not been part of that step
    p.remove(holder)
    assert source not in p.pool.allocate(p.pool.num_free)
    p.settle(copying)
    assert p.pool.allocate(1) == [source]


def test_a_number_is_drawn_for_the_place_of_a_token_whether_those_before_it_were_read_or_not() -> None:
    sampling = Sampling(max_tokens=9, seed=4, temperature=1.0)
    logits = torch.linspace(0, 1, 500).repeat(2, 1)
    rows = [SamplingRow(sampling, 0, [1, 2, 3], 1), SamplingRow(sampling, 0, [1, 2], 1, unread=1)]
    for tokens in (sample(logits.clone(), rows).tokens, choose_in_torch(logits.clone(), rows)[0]):
        assert tokens[0] == tokens[1]
        assert tokens[0] != sample(logits.clone(), [rows[1]._replace(unread=0)] * 2).tokens[0]
