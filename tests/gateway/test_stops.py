from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sfllm_gateway.stops import StopMatcher

TEXT = st.text("ab<>", max_size=40)
STOPS = st.lists(st.text("ab<>", min_size=1, max_size=6), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the first complete stop string ends, and the longest one that ends there, the plain way."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


@given(TEXT, STOPS, st.lists(st.integers(0, 5)), st.booleans())
def test_what_is_shown_ends_before_the_first_stop_however_the_text_is_cut(
    text: str, stops: list[str], sizes: list[int], include: bool
) -> None:
    matcher = StopMatcher(stops, include)
    expected = first_stop(text, stops)
    shown, found, start = "", None, 0
    for size in [*sizes, len(text)]:
        match = matcher.feed(text[start : start + size])
        start += size
        shown += match.text
        if match.stop is not None:
            found = match.stop
            break
    if expected is None:
        assert found is None
        assert shown + matcher.finish() == text
    else:
        end, stop = expected
        assert found == stop
        assert shown == text[: end if include else end - len(stop)]


@given(TEXT, STOPS)
def test_no_prefix_of_a_stop_string_is_shown_while_it_could_still_complete(
    text: str, stops: list[str]
) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for position, character in enumerate(text):
        match = matcher.feed(character)
        shown += match.text
        if match.stop is not None:
            return
        held = text[len(shown) : position + 1]
        so_far = text[: position + 1]
        prefixes = [stop[:size] for stop in stops for size in range(len(stop))]
        longest = max(len(prefix) for prefix in prefixes if so_far.endswith(prefix))
        assert len(held) == longest


def test_text_that_was_held_back_comes_when_it_turns_out_to_be_no_stop() -> None:
    matcher = StopMatcher(["</end>"])
    assert matcher.feed("hi</e").text == "hi"
    assert matcher.feed("x").text == "</ex"
    assert matcher.feed("<").text == ""
    assert matcher.finish() == "<"
