"""Figures: fairness, overtakes, the search for the best load."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfllm_cli.simulate.fairness import fair_shares, fairness, jain
from sfllm_cli.simulate.overtakes import Overtakes
from sfllm_cli.simulate.search import best_load

DEMANDS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.0, 1000.0), min_size=1)


def test_jain_is_one_for_equals_and_one_over_n_for_one_that_has_everything() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([1.0, 2.0, 3.0]) == pytest.approx(36 / (3 * 14))
    assert jain([]) == 1.0


@settings(deadline=None, derandomize=True)
@given(DEMANDS, st.floats(0.0, 5000.0))
def test_fair_shares_give_everything_and_nobody_more_than_it_wants(
    demands: dict[str, float], total: float
) -> None:
    shares = fair_shares(demands, total)
    assert sum(shares.values()) == pytest.approx(min(total, sum(demands.values())), abs=1e-6)
    most = max(shares.values())
    for name, share in shares.items():
        assert share <= demands[name]
        # Who does not get all it wants has as much as anybody.
        assert share == pytest.approx(demands[name], abs=1e-6) or share == pytest.approx(most, abs=1e-6)


def test_a_modest_tenant_that_gets_what_it_asked_for_is_served_fairly() -> None:
    assert fairness({"a": 900.0, "b": 100.0}, {"a": 400.0, "b": 100.0}) == pytest.approx(1.0)


def test_a_tenant_that_pushes_another_aside_makes_it_unfair() -> None:
    even = fairness({"a": 900.0, "b": 300.0}, {"a": 300.0, "b": 300.0})
    pushed = fairness({"a": 900.0, "b": 300.0}, {"a": 450.0, "b": 150.0})
    assert even == pytest.approx(1.0)
    assert pushed < 0.85


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 100)), max_size=60))
def test_overtakes_are_counted_as_by_looking_at_every_pair(moves: list[tuple[bool, int]]) -> None:
    """Each move is an arrival, or the grant of one of those that wait."""
    overtakes, waiting, number = Overtakes(), list[int](), 0
    overtaken: dict[int, int] = {}
    most = 0
    for arrives, choice in moves:
        if arrives or not waiting:
            number += 1
            waiting.append(number)
            overtaken[number] = 0
            overtakes.came("", number)
        else:
            granted = waiting.pop(choice % len(waiting))
            for other in waiting:
                overtaken[other] += other < granted
            most = max(most, overtaken[granted])
            overtakes.granted("", granted)
    assert overtakes.most == most


def test_tenants_do_not_overtake_each_other() -> None:
    overtakes = Overtakes()
    for number in range(10):
        overtakes.came("a" if number < 5 else "b", number)
    for number in reversed(range(5, 10)):
        overtakes.granted("b", number)
    assert overtakes.most == 4
    for number in range(5):
        overtakes.granted("a", number)
    assert overtakes.most == 4


def test_one_that_left_without_a_grant_overtook_nobody() -> None:
    overtakes = Overtakes()
    for number in range(3):
        overtakes.came("", number)
    overtakes.left("", 1)
    overtakes.granted("", 1)
    overtakes.granted("", 0)
    assert overtakes.most == 0


@settings(deadline=None, derandomize=True)
@given(st.floats(0.5, 1.6))
def test_the_search_ends_near_the_peak(peak: float) -> None:
    tried: list[float] = []

    def goodput(load: float) -> float:
        tried.append(load)
        return -abs(load - peak)

    assert abs(best_load(goodput) - peak) <= 0.11
    assert len(tried) == len(set(tried)) <= 9


def test_the_lowest_of_equal_loads_is_the_best() -> None:
    assert best_load(lambda _load: 1.0) == pytest.approx(0.45)
