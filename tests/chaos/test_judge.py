from __future__ import annotations

import random

import pytest
from chaos.ask import Delivered, Delivery, Ended
from chaos.judge import Difference, judge
from chaos.templates import Template
from hypothesis import given
from hypothesis import strategies as st

REQUEST = Template("request", "/v1/completions", {})
TOKENS = list(range(100, 140))


def delivery(
    ids: list[int],
    ended: Ended = "complete",
    logprobs: list[float] | None = None,
    reason: str | None = "length",
) -> Delivery:
    text = "".join(f" {token}" for token in ids)
    choice = Delivered(ids, text, logprobs or [], reason)
    return Delivery(REQUEST, {0: choice}, usage_tokens=len(ids), ended=ended, status=200)


CALM = delivery(TOKENS)


def kind_of(got: Delivery) -> str | None:
    fault = judge(CALM, got)
    return None if fault is None else fault.kind


def test_an_equal_answer_has_no_fault() -> None:
    assert kind_of(delivery(TOKENS)) is None


@given(st.integers(1, len(TOKENS) - 3), st.integers(1, 3))
def test_a_token_that_came_twice_is_noticed(at: int, count: int) -> None:
    at = max(at, count)
    assert kind_of(delivery(TOKENS[:at] + TOKENS[at - count : at] + TOKENS[at:])) == "doubled"


@given(st.integers(0, len(TOKENS) - 3), st.integers(1, 3))
def test_a_missing_token_is_noticed_wherever_it_was(at: int, count: int) -> None:
    assert kind_of(delivery(TOKENS[:at] + TOKENS[at + count :])) == "lost"


@given(st.integers(0, len(TOKENS) - 1))
def test_another_token_is_noticed(at: int) -> None:
    assert kind_of(delivery([*TOKENS[:at], 7, *TOKENS[at + 1 :]])) in {"wrong", "doubled", "lost"}


@given(st.integers(0, len(TOKENS)), st.sampled_from(["left", "broken"]))
def test_what_came_until_a_client_left_may_be_any_beginning(size: int, ended: Ended) -> None:
    assert kind_of(delivery(TOKENS[:size], ended, reason=None)) is None


def test_what_came_until_a_client_left_must_be_the_beginning() -> None:
    assert kind_of(delivery(TOKENS[1:9], "left", reason=None)) == "lost"


def test_a_choice_that_never_came_is_lost() -> None:
    assert kind_of(Delivery(REQUEST, ended="complete", usage_tokens=0)) == "lost"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: setattr(found.choices[0], "text", found.choices[0].text + "!"),
        lambda found: setattr(found.choices[0], "finish_reason", "stop"),
        lambda found: setattr(found, "usage_tokens", 3),
        lambda found: found.choices.setdefault(1, Delivered()),
    ],
)
def test_right_tokens_with_something_wrong_beside_them_are_noticed(spoil: object) -> None:
    got = delivery(list(TOKENS))
    assert callable(spoil)
    spoil(got)
    assert kind_of(got) is not None


def test_log_probabilities_may_differ_by_the_tolerance_only() -> None:
    values = [random.Random(1).random() for _ in TOKENS]
    calm = delivery(TOKENS, logprobs=values)
    close = delivery(TOKENS, logprobs=[value + 1e-4 for value in values])
    assert judge(calm, close, logprob_tolerance=2e-4) is None
    assert judge(calm, close) is not None
    assert judge(calm, delivery(TOKENS, logprobs=values[1:])) is not None


def test_a_different_token_is_no_fault_when_it_is_excused() -> None:
    got = delivery([*TOKENS[:20], 7, 8, 9])
    seen = []

    def excuse(difference: Difference, _: Delivery) -> bool:
        seen.append(difference)
        return True

    assert judge(CALM, got, excuse=excuse) is None
    assert seen == [Difference(0, 20, TOKENS[20], 7)]
    assert judge(CALM, got, excuse=lambda *_: False) is not None
