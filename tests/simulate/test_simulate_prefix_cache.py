"""The cache of beginnings against lists that are searched from end to end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfllm_cli.simulate.prefix_cache import PrefixCache


class Naive:
    """The names of every user, and idle names with the one used longest ago first."""

    def __init__(self) -> None:
        self.users: list[list[int]] = []
        self.idle: list[int] = []

    def is_used(self, name: int) -> bool:
        return any(name in names for names in self.users)

    def use(self, names: list[int]) -> None:
        self.users.append(names)
        self.idle = [name for name in self.idle if name not in names]

    def leave(self, names: list[int]) -> None:
        self.users.remove(names)
        self.idle += [name for name in reversed(names) if not self.is_used(name)]


def beginnings(family: int, count: int) -> list[int]:
    """Names of which two families have the first two in common."""
    return [number if number < 2 else 100 * family + number for number in range(count)]


NAMES = st.builds(beginnings, st.integers(1, 3), st.integers(0, 6))
MOVES = st.tuples(st.sampled_from(["use", "leave", "evict"]), NAMES, st.integers(0, 10))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(MOVES, max_size=40))
def test_every_history_leaves_what_the_naive_one_leaves(moves: list[tuple[str, list[int], int]]) -> None:
    cache, naive = PrefixCache(), Naive()
    for move, names, number in moves:
        if move == "use":
            cache.use(names)
            naive.use(names)
        elif move == "leave" and naive.users:
            left = naive.users[number % len(naive.users)]
            cache.leave(left)
            naive.leave(left)
        elif move == "evict":
            count = min(number, len(naive.idle))
            cache.evict(count)
            del naive.idle[:count]
        cache.check_integrity(naive.users)
        here = [name for name in range(400) if naive.is_used(name) or name in naive.idle]
        assert [name for name in range(400) if name in cache] == here
        assert cache.idle == len(naive.idle)
        assert cache.used == len(here) - len(naive.idle)
        found = cache.longest(names)
        assert all(name in here for name in names[:found])
        assert found == len(names) or names[found] not in here
        assert cache.idle_among(names) == len(set(names) & set(naive.idle))


def test_the_end_of_a_prompt_is_evicted_before_its_beginning() -> None:
    cache = PrefixCache()
    cache.use([1, 2, 3])
    cache.leave([1, 2, 3])
    cache.evict(1)
    assert cache.longest([1, 2, 3]) == 2


def test_names_in_use_cannot_be_evicted() -> None:
    cache = PrefixCache()
    cache.use([1, 2])
    with pytest.raises(KeyError):
        cache.evict(1)
    assert cache.longest([1, 2]) == 2


def test_a_name_that_nobody_refers_to_fails_the_check() -> None:
    cache = PrefixCache()
    cache.use([1])
    with pytest.raises(AssertionError):
        cache.check_integrity([])
