from hypothesis import given
from hypothesis import strategies as st

from sfllm.prefixes import CHUNK_TOKENS, MAX_PREFIXES, prefix_names
from sfllm.wire import as_array


def names(tokens: list[int], salt: str = "") -> list[int]:
    return list(prefix_names(as_array("I", tokens), salt))


@given(st.lists(st.integers(0, 9), max_size=300), st.lists(st.integers(0, 9), max_size=300))
def test_two_prompts_share_a_name_exactly_as_far_as_their_chunks_are_equal(
    first: list[int], second: list[int]
) -> None:
    pairs = zip(names(first), names(second), strict=False)
    for index, (one, other) in enumerate(pairs):
        end = (index + 1) * CHUNK_TOKENS
        assert (one == other) == (first[:end] == second[:end])


@given(st.integers(1, 20_000))
def test_the_last_token_and_what_lies_beyond_the_bound_have_no_name(count: int) -> None:
    assert len(names([7] * count)) == min((count - 1) // CHUNK_TOKENS, MAX_PREFIXES)


def test_the_salt_makes_other_names() -> None:
    prompt = list(range(200))
    assert names(prompt, "a") == names(prompt, "a")
    assert not set(names(prompt, "a")) & set(names(prompt, "b"))


def test_a_name_says_what_came_before_its_chunk() -> None:
    assert len(set(names([5] * 65 * CHUNK_TOKENS))) == 64
