"""The digest by which two sides notice that they hold different things."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sfllm.holdings import OpenChoice, digest, fingerprint

numbers = st.integers(0, 2**32 - 1)
choices = st.builds(OpenChoice, st.binary(max_size=20), st.integers(0, 2**64 - 1), numbers, numbers)


@given(st.lists(choices, unique=True), st.randoms(use_true_random=False))
def test_the_order_makes_no_difference(held: list[OpenChoice], rng: object) -> None:
    shuffled = list(held)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    assert digest(shuffled) == digest(held)


@given(st.sets(choices), choices)
def test_adding_and_removing_is_an_xor(held: set[OpenChoice], one: OpenChoice) -> None:
    assert digest(held - {one}) ^ fingerprint(one) == digest(held | {one})


@given(st.sets(choices), st.sets(choices))
def test_different_sets_have_different_digests(first: set[OpenChoice], second: set[OpenChoice]) -> None:
    assert (digest(first) == digest(second)) == (first == second)


def test_a_digest_is_the_same_in_every_process_and_fits_a_message() -> None:
    assert digest([]) == 0
    assert fingerprint(OpenChoice(b"g-1", 7, 0, 1)) == 0x04EC151A31CE6182
