"""The choice between schedulers: within the bound, alike everywhere, and moving no more than it must."""

from __future__ import annotations

import math
import random
from collections import Counter

from hypothesis import example, given
from hypothesis import strategies as st

from sfllm.rendezvous import LOAD_BOUND, Candidate, choose

WEIGHTS = st.lists(st.integers(1, 20), min_size=1, max_size=8)
ROOM = 10**9
"""So many open requests everywhere that the bound is nowhere reached."""


def addresses(count: int) -> list[str]:
    return [f"tcp://scheduler-{index}:5557" for index in range(count)]


@given(weights=WEIGHTS, seed=st.integers(0, 2**32), keys=st.integers(1, 5))
@example(weights=[1, 1, 10, 20, 13, 20], seed=0, keys=1)  # a bound of just 27, which floats miss
def test_no_scheduler_has_more_than_its_bounded_share_whatever_the_keys(
    weights: list[int], seed: int, keys: int
) -> None:
    chance = random.Random(seed)
    loads = [0] * len(weights)
    for total in range(1, 200):
        candidates = [Candidate(*each) for each in zip(addresses(len(weights)), weights, loads, strict=True)]
        position = choose(b"key %d" % chance.randrange(keys), candidates)
        loads[position] += 1
        assert loads[position] <= math.ceil(LOAD_BOUND * total * weights[position] / sum(weights))


def unloaded(weights: list[int], key: bytes) -> int:
    names = addresses(len(weights))
    return choose(key, [Candidate(name, w, w * ROOM) for name, w in zip(names, weights, strict=True)])


def test_the_shares_of_many_keys_follow_the_weights() -> None:
    weights = [1, 2, 3, 4]
    counts = Counter(unloaded(weights, b"%d" % key) for key in range(10_000))
    for position, weight in enumerate(weights):
        assert abs(counts[position] / 10_000 - weight / 10) < 0.02


@given(weights=st.lists(st.integers(1, 9), min_size=2, max_size=8), data=st.data())
def test_when_a_scheduler_leaves_only_its_own_requests_move(weights: list[int], data: st.DataObject) -> None:
    gone = data.draw(st.integers(0, len(weights) - 1))
    names = addresses(len(weights))
    candidates = [Candidate(name, w, w * ROOM) for name, w in zip(names, weights, strict=True)]
    left = [candidate for index, candidate in enumerate(candidates) if index != gone]
    for key in range(50):
        before = candidates[choose(b"%d" % key, candidates)]
        after = left[choose(b"%d" % key, left)]
        assert after == before or before is candidates[gone]


@given(weights=st.lists(st.integers(1, 9), min_size=2, max_size=8), data=st.data())
def test_more_workers_only_draw_requests_to_their_own_scheduler(
    weights: list[int], data: st.DataObject
) -> None:
    grown = data.draw(st.integers(0, len(weights) - 1))
    more = [weight + (index == grown) for index, weight in enumerate(weights)]
    for key in range(50):
        before, after = unloaded(weights, b"%d" % key), unloaded(more, b"%d" % key)
        assert after in (before, grown)


@given(st.randoms(use_true_random=False), st.binary(max_size=100))
def test_the_choice_does_not_depend_on_the_order_of_the_addresses(chance: random.Random, key: bytes) -> None:
    candidates = [Candidate(name, 2, 2 * ROOM) for name in addresses(5)]
    shuffled = chance.sample(candidates, 5)
    assert candidates[choose(key, candidates)] == shuffled[choose(key, shuffled)]
