"""How a step's prefill is shared between the oldest prompt and the shortest ones."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from sfllm.messages import Sampling
from sfllm_worker.engine.planner import Limits, Planner
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.kv.block_pool import BlockPool

BUDGET = 16
SAMPLING = Sampling(max_tokens=1, seed=0)
NEXT_TOKEN = itertools.count()


def sharing_planner(blocks: int = 200, max_sequences: int = 8) -> Planner:
    planner = Planner(Limits(max_sequences, BUDGET, block_size=4), BlockPool(blocks + 1))
    planner.shortest_first = True
    return planner


def add(planner: Planner, tokens: int) -> Sequence:
    content = [next(NEXT_TOKEN) for _ in range(tokens)]
    sequence = Sequence("r", 0, content, tokens, SAMPLING)
    planner.add(sequence)
    return sequence


def step(planner: Planner) -> dict[Sequence, int]:
    """Run a step; how many tokens of each prompt it computed. Whoever is computed whole leaves."""
    plan = planner.plan()
    planner.launch(plan)
    planner.settle(plan)
    for row in plan.rows:
        if row.completes:
            planner.remove(row.sequence)
    return {row.sequence: row.num_tokens for row in plan.rows}


def test_a_short_prompt_is_computed_beside_a_long_one_that_came_first() -> None:
    planner = sharing_planner()
    long, short = add(planner, 100), add(planner, 5)
    assert step(planner) == {long: 11, short: 5}, "what the short one leaves over is the long one's"


def test_the_shortest_of_those_that_are_being_computed_goes_first() -> None:
    planner = sharing_planner()
    oldest, middle, short = add(planner, 100), add(planner, 7), add(planner, 4)
    assert step(planner) == {oldest: 8, middle: 4, short: 4}
    assert step(planner) == {oldest: 13, middle: 3}


def test_prompts_of_like_length_are_computed_one_after_the_other() -> None:
    planner = sharing_planner()
    first, second = add(planner, 40), add(planner, 40)
    assert [step(planner) for _ in range(3)] == [{first: 16}, {first: 16}, {first: 8, second: 8}]


def test_prompts_that_are_all_short_fill_the_step() -> None:
    planner = sharing_planner()
    prompts = [add(planner, 4) for _ in range(5)]
    assert step(planner) == dict.fromkeys(prompts[:4], 4)


def test_the_oldest_gets_half_however_many_short_ones_come() -> None:
    planner = sharing_planner()
    oldest = add(planner, 80)
    steps = 0
    while oldest in planner.running or oldest in planner.waiting:
        for _ in range(4):
            add(planner, 4)
        assert step(planner)[oldest] >= BUDGET // 2
        steps += 1
    assert steps == 80 // (BUDGET // 2)


def test_a_prompt_alone_gets_the_whole_step() -> None:
    planner = sharing_planner()
    alone = add(planner, 40)
    assert [step(planner)[alone] for _ in range(3)] == [16, 16, 8]


def test_in_the_order_of_arrival_a_short_prompt_waits_behind_a_long_one() -> None:
    planner = sharing_planner()
    planner.shortest_first = False
    long, _ = add(planner, 100), add(planner, 5)
    assert step(planner) == {long: BUDGET}


def test_a_short_prompt_that_finds_no_room_in_the_cache_waits() -> None:
    planner = sharing_planner(blocks=25)
    long, short = add(planner, 100), add(planner, 5)
    assert step(planner) == {long: BUDGET}
    assert list(planner.waiting) == [short]


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 3)), min_size=1, max_size=30))
def test_no_budget_is_wasted_and_everybody_comes_to_an_end(arrivals: list[tuple[int, int]]) -> None:
    planner = sharing_planner(blocks=60)
    live: list[Sequence] = []
    for tokens, steps in arrivals:
        live.append(add(planner, tokens))
        for _ in range(steps):
            _checked_step(planner)
    for _ in range(sum(tokens for tokens, _ in arrivals) + 1):
        if not planner.has_work:
            break
        _checked_step(planner)
    assert not planner.has_work
    assert all(sequence.computed == len(sequence.tokens) for sequence in live)


def _checked_step(planner: Planner) -> None:
    """A step is full, or computes the rest of all prompts that have room."""
    oldest = planner.running[0] if planner.running else None
    left = oldest.remaining if oldest is not None else 0
    counts = step(planner)
    planner.check_integrity()
    total = sum(counts.values())
    assert total <= BUDGET
    if oldest is not None:
        assert counts[oldest] >= min(left, BUDGET // 2)
    assert total == BUDGET or not planner.running
