"""Choosing the number of threads of a step, on made-up machines."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfllm_worker.native.threads import (
    FIRST_INTERVAL_STEPS,
    LONGEST_INTERVAL_STEPS,
    MOST_TOKENS,
    ThreadChoice,
)

Cost = Callable[[int], float]


def run(choice: ThreadChoice, cost: Cost, most: int, steps: int, tokens: int = 1) -> list[int]:
    """What it chose for each of these steps, of which each takes `cost(threads)` seconds."""
    chosen = []
    for _ in range(steps):
        threads = choice.choose(tokens, most)
        choice.saw(tokens, cost(threads))
        chosen.append(threads)
    return chosen


@given(best=st.sampled_from([1, 2, 4, 8, 16]), seed=st.integers(0, 1000))
def test_it_finds_the_fastest_number_though_steps_vary(best: int, seed: int) -> None:
    random = Random(seed)

    def cost(threads: int) -> float:
        away = max(threads, best) / min(threads, best)
        return away**0.5 * random.uniform(1.0, 1.05)

    chosen = run(ThreadChoice(), cost, most=16, steps=3000)
    assert chosen[0] == 16
    settled = chosen[1000:]
    assert settled.count(best) > 0.95 * len(settled)


def test_it_follows_at_once_when_steps_become_slow_and_in_time_when_they_could_be_faster() -> None:
    choice = ThreadChoice()
    run(choice, lambda threads: 1 / threads, most=4, steps=3 * LONGEST_INTERVAL_STEPS)
    busy = run(choice, float, most=4, steps=20 * FIRST_INTERVAL_STEPS)
    assert busy[-10:].count(1) >= 6
    run(choice, float, most=4, steps=3 * LONGEST_INTERVAL_STEPS)
    quiet = run(choice, lambda threads: 1 / threads, most=4, steps=3 * LONGEST_INTERVAL_STEPS)
    assert quiet[-20:] == [4] * 20


def test_in_the_long_run_next_to_no_step_is_a_trial() -> None:
    choice = ThreadChoice()
    run(choice, lambda threads: 1 / threads, most=2, steps=3 * LONGEST_INTERVAL_STEPS)
    chosen = run(choice, lambda threads: 1 / threads, most=2, steps=10 * LONGEST_INTERVAL_STEPS)
    assert chosen.count(1) < len(chosen) / 1000


@pytest.mark.parametrize("slower", [2.0, 4.0])
def test_trying_costs_little_where_all_threads_are_the_fastest(slower: float) -> None:
    def cost(threads: int) -> float:
        return 1.0 if threads == 64 else slower

    chosen = run(ThreadChoice(), cost, most=64, steps=5000)
    assert set(chosen) == {32, 64}, "never further away than a neighbour"
    assert sum(map(cost, chosen)) < 1.05 * len(chosen)


def test_large_steps_and_single_threads_are_not_tried_with() -> None:
    choice = ThreadChoice()
    assert set(run(choice, lambda threads: threads, most=8, steps=200, tokens=MOST_TOKENS + 1)) == {8}
    assert set(run(choice, lambda threads: threads, most=1, steps=200)) == {1}


def test_another_limit_starts_anew() -> None:
    choice = ThreadChoice()
    run(choice, lambda threads: 1.0 / threads, most=4, steps=100)
    assert choice.choose(1, 2) == 2
    assert set(run(choice, lambda threads: threads, most=2, steps=200)[-50:]) <= {1, 2}


def test_an_odd_number_of_threads_is_halved_upwards_and_doubled_up_to_all() -> None:
    chosen = run(ThreadChoice(), lambda threads: abs(threads - 3) + 1.0, most=5, steps=300)
    assert chosen[-50:].count(3) > 40
