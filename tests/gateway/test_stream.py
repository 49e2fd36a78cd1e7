from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sfllm.errors import ErrorCode
from sfllm.messages import (
    ALL_CHOICES,
    PROBATION_TOKENS,
    Cancel,
    Finished,
    Interrupted,
    Rejected,
    Resend,
    Sampling,
    Submit,
    Timings,
)
from sfllm.token_batch import Logprobs
from sfllm_gateway.stream import RESEND_SECONDS, Gap, Request, Stream

LENGTH = 12
PROMPT = [1, 2, 3, 4, 5]


def token(choice: int, index: int) -> int:
    """The one true token of a position: whoever serves the request, it is this one."""
    return 1000 * choice + index


def candidates(ids: list[int]) -> Logprobs:
    """Two a token: itself, and the next id."""
    flat = [candidate for found in ids for candidate in (found, found + 1)]
    return Logprobs(2, flat, [-float(candidate) for candidate in flat])


def new_stream(n: int = 2, max_attempts: int = 4, logprobs: int = -1, prompt_logprobs: int = -1) -> Stream:
    sampling = Sampling(max_tokens=LENGTH, seed=1, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    return Stream(7, Request("r", "m", array("I", PROMPT), n, sampling), max_attempts)


def interrupted(attempt: int, suspects: int = 0, worker: str = "w") -> Interrupted:
    return Interrupted(7, attempt, "lost", worker, suspects)


def submitted(stream: Stream) -> Submit:
    message = stream.submit(1000).message
    assert isinstance(message, Submit)
    return message


def finished(attempt: int, choice: int, count: int, reason: str = "length") -> Finished:
    return Finished(7, attempt, choice, reason, -1, 2, 0, count, Timings())


class Network(RuleBasedStateMachine):
    """Workers of several attempts whose messages come late, twice, out of order or never."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = new_stream(max_attempts=1000, logprobs=1, prompt_logprobs=1)

    @rule(age=st.integers(0, 2), start=st.integers(1, 6), count=st.integers(0, 6))
    def logprobs_of_the_prompt_arrive(self, age: int, start: int, count: int) -> None:
        attempt = self.stream.attempt - age
        known = len(self.stream.prompt.logprobs)
        if not self.stream.on_prompt_logprobs(attempt, start, candidates(PROMPT[start : start + count])):
            assert attempt == self.stream.attempt
            assert start > known + 1
            self.stream.restart(counts=True)

    @precondition(lambda self: not self.stream.prompt.complete)
    @rule()
    def the_prompt_is_read(self) -> None:
        assert self.stream.on_prompt_logprobs(self.stream.attempt, 1, candidates(PROMPT[1:]))

    @rule(
        age=st.integers(0, 2), choice=st.integers(0, 3), start=st.integers(0, LENGTH), count=st.integers(0, 6)
    )
    def tokens_arrive(self, age: int, choice: int, start: int, count: int) -> None:
        attempt = self.stream.attempt - age
        if attempt < 0:
            return
        ids = [token(choice, index) for index in range(start, min(start + count, LENGTH + 3))]
        if self.stream.on_tokens(attempt, choice, start, ids, candidates(ids)) is not Gap.NONE:
            assert attempt == self.stream.attempt
            assert start > len(self.stream.choices[choice].ids) or not self.stream.prompt.complete
            self.stream.restart(counts=True)

    @precondition(lambda self: self.stream.prompt.complete)
    @rule(choice=st.integers(0, 1), count=st.integers(1, 4))
    def the_worker_goes_on(self, choice: int, count: int) -> None:
        start = len(self.stream.choices[choice].ids)
        ids = [token(choice, index) for index in range(start, start + count)]
        gap = self.stream.on_tokens(self.stream.attempt, choice, start, ids, candidates(ids))
        assert gap is Gap.NONE

    @rule(age=st.integers(0, 2), choice=st.integers(0, 1), count=st.integers(0, LENGTH))
    def a_choice_finishes(self, age: int, choice: int, count: int) -> None:
        before = self.stream.choices[choice].finish_reason
        known = self.stream.on_finished(finished(self.stream.attempt - age, choice, count, "stop"))
        if not known:
            assert count > len(self.stream.choices[choice].ids) or not self.stream.prompt.complete
            self.stream.restart(counts=True)
        elif age and before is None:
            assert self.stream.choices[choice].finish_reason is None

    @rule(age=st.integers(0, 2))
    def the_worker_is_lost(self, age: int) -> None:
        before = self.stream.attempt
        if self.stream.on_interrupted(interrupted(before - age, suspects=1)):
            assert age == 0
        assert self.stream.attempt - before in ({0, 1} if age == 0 else {0})

    @precondition(lambda self: not self.stream.ended)
    @rule()
    def the_scheduler_restarts(self) -> None:
        self.stream.restart(counts=False)

    @invariant()
    def every_token_is_journalled_once_and_in_order(self) -> None:
        for number, choice in enumerate(self.stream.choices):
            assert list(choice.ids) == [token(number, index) for index in range(len(choice.ids))]
            assert len(choice.ids) <= LENGTH
            assert len(choice.logprobs) == len(choice.ids)
            found = choice.logprobs.part(0, LENGTH)
            assert (2, *map(list, found[1:])) == candidates(list(choice.ids))

    @invariant()
    def the_prompts_logprobs_are_whole_before_the_first_token(self) -> None:
        prompt = self.stream.prompt
        known = len(prompt.logprobs)
        assert (2, *map(list, prompt.logprobs.part(0, 9)[1:])) == candidates(PROMPT[1 : known + 1])
        assert prompt.complete == (known == len(PROMPT) - 1)
        assert prompt.complete or not any(choice.ids for choice in self.stream.choices)

    @invariant()
    def a_submission_says_what_is_here(self) -> None:
        message, (prompt, so_far, _) = self.stream.submit(1000)
        assert isinstance(message, Submit)
        open_choices = [i for i, choice in enumerate(self.stream.choices) if choice.finish_reason is None]
        assert list(message.choices) == open_choices
        assert list(prompt) == PROMPT
        assert message.sampling.prompt_logprobs == (-1 if self.stream.prompt.complete else 1)
        assert list(so_far) == [t for i in open_choices for t in self.stream.choices[i].ids]


TestNetwork = Network.TestCase
TestNetwork.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_crashes_that_a_request_may_be_on_are_bounded() -> None:
    stream = new_stream(max_attempts=3)
    assert stream.on_interrupted(interrupted(0, suspects=5))
    assert stream.on_interrupted(interrupted(1, suspects=1))
    assert not stream.on_interrupted(interrupted(2, suspects=2))
    assert stream.error is not None
    assert stream.error.code is ErrorCode.ENGINE_FAILURE
    assert stream.request.request_id in stream.error.message
    assert stream.ended


def test_the_times_that_tokens_may_be_missing_are_bounded() -> None:
    stream = new_stream(max_attempts=2)
    assert stream.restart(counts=True)
    assert not stream.restart(counts=True)
    assert stream.error is not None


def test_restarts_of_the_scheduler_and_moves_do_not_use_up_attempts() -> None:
    stream = new_stream(max_attempts=1)
    assert all(stream.restart(counts=False) for _ in range(5))
    assert all(stream.on_interrupted(interrupted(attempt)) for attempt in range(5, 10))
    assert stream.attempt == 10


def test_crashes_alone_are_counted_and_suspicion_is_carried() -> None:
    stream = new_stream(max_attempts=20)
    for suspects, alone in ((4, 0), (1, 1), (2, 1), (0, 1), (1, 2)):
        stream.on_interrupted(interrupted(stream.attempt, suspects))
        message = submitted(stream)
        assert (message.suspects, message.crashes_alone) == (suspects, alone)


@pytest.mark.parametrize("lost_by", ["crash", "drain", "gap", "scheduler"])
@pytest.mark.parametrize("tokens", [PROBATION_TOKENS - 1, PROBATION_TOKENS])
def test_an_attempt_that_came_far_enough_clears_of_earlier_crashes(lost_by: str, tokens: int) -> None:
    stream = new_stream(max_attempts=20)
    stream.on_tokens(0, 1, 0, [1000, 1001])  # what older attempts brought does not count
    stream.on_interrupted(interrupted(0, 1))
    stream.on_tokens(1, 1, 2, [token(1, index) for index in range(2, 2 + tokens)])
    if lost_by in {"crash", "drain"}:
        stream.on_interrupted(interrupted(1, 1 if lost_by == "crash" else 0))
    else:
        stream.restart(counts=lost_by == "gap")
    message = submitted(stream)
    expected_alone = (lost_by == "crash") + (tokens < PROBATION_TOKENS)
    assert message.crashes_alone == expected_alone
    still = lost_by in {"gap", "scheduler"} and tokens < PROBATION_TOKENS
    assert message.suspects == int(lost_by == "crash" or still)


def test_a_gap_asks_once_and_is_over_when_tokens_follow() -> None:
    stream = new_stream(n=1)
    stream.on_tokens(0, 0, 0, [0, 1])
    assert stream.on_tokens(0, 0, 4, [4]) is Gap.ASK
    assert stream.resend(0, now=10.0).message == Resend(7, 0, 0, 2)
    assert stream.on_tokens(0, 0, 5, [5]) is Gap.NONE
    assert stream.on_tokens(0, 0, 0, [0, 1]) is Gap.NONE
    assert stream.resend_failed(10.0 + RESEND_SECONDS)
    assert not stream.resend_failed(9.9 + RESEND_SECONDS)
    assert stream.on_tokens(0, 0, 2, [2, 3, 4, 5]) is Gap.NONE
    assert not stream.resend_failed(100.0)
    assert stream.on_tokens(0, 0, 8, [8]) is Gap.ASK


@pytest.mark.parametrize("end", ["finish", "stop", "next attempt"])
def test_what_ends_a_choice_or_an_attempt_ends_the_wait_for_its_tokens(end: str) -> None:
    stream = new_stream()
    stream.on_tokens(0, 0, 3, [3])
    stream.resend(0, now=0.0)
    if end == "finish":
        stream.on_finished(finished(0, 0, 0, "stop"))
    elif end == "stop":
        stream.stop_choice(0, 0)
    else:
        stream.restart(counts=True)
    assert not stream.resend_failed(100.0)


def test_a_choice_with_all_its_tokens_needs_no_worker_to_end() -> None:
    stream = new_stream(n=1)
    stream.on_tokens(0, 0, 0, list(range(LENGTH)))
    assert not stream.on_interrupted(interrupted(0))
    assert stream.choices[0].finish_reason == "length"
    assert stream.error is None


def test_the_next_attempt_avoids_the_worker_that_was_lost() -> None:
    stream = new_stream()
    stream.on_interrupted(interrupted(0, worker="w-9"))
    assert submitted(stream).last_worker == "w-9"
    stream.on_interrupted(interrupted(1, worker=""))
    assert submitted(stream).last_worker == "w-9"


@pytest.mark.parametrize(("ended", "expected"), [((), 0), ((1,), ALL_CHOICES)])
def test_a_stop_string_cancels_one_choice_and_the_last_one_cancels_all(
    ended: tuple[int, ...], expected: int
) -> None:
    stream = new_stream()
    for choice in ended:
        stream.on_finished(finished(0, choice, 0, "stop"))
    stream.on_tokens(0, 0, 0, [0, 1, 2])
    outgoing = stream.stop_choice(0, kept_tokens=2)
    assert outgoing is not None
    assert outgoing.message == Cancel(7, 0, expected, "stop")
    assert list(stream.choices[0].ids) == [0, 1]


def test_a_stop_string_in_the_last_tokens_goes_before_length() -> None:
    stream = new_stream(n=1)
    stream.on_tokens(0, 0, 0, list(range(LENGTH)))
    stream.on_finished(finished(0, 0, LENGTH))
    assert stream.stop_choice(0, kept_tokens=LENGTH) is None
    assert stream.choices[0].finish_reason == "stop"


def test_a_stop_string_drops_the_logprobs_of_what_it_drops() -> None:
    stream = new_stream(n=1, logprobs=1)
    stream.on_tokens(0, 0, 0, [0, 1, 2], candidates([0, 1, 2]))
    stream.stop_choice(0, kept_tokens=2)
    assert len(stream.choices[0].logprobs) == 2


def test_tokens_without_the_logprobs_that_were_asked_for_are_not_taken() -> None:
    stream = new_stream(n=1, logprobs=1)
    assert stream.on_tokens(0, 0, 0, [0, 1]) is Gap.RESTART
    assert not stream.choices[0].ids


def test_an_aborted_choice_is_taken_up_again() -> None:
    assert not new_stream().on_finished(finished(0, 0, 0, "abort"))


@given(st.text())
def test_a_rejection_with_any_code_becomes_an_error(code: str) -> None:
    stream = new_stream()
    stream.on_rejected(Rejected(7, 0, code, "no", 2.0))
    assert stream.error is not None
    assert stream.ended


@pytest.mark.parametrize("text", ["it broke", "request r is not tried again"])
def test_a_failure_names_the_request_once(text: str) -> None:
    stream = Stream(7, Request("req-9", "m", array("I", PROMPT), 1, Sampling(LENGTH, 1)), 4)
    stream.on_rejected(Rejected(7, 0, "engine_failure", text.replace(" r ", " req-9 ")))
    assert stream.error is not None
    assert stream.error.message.count("req-9") == 1


def test_the_first_end_wins() -> None:
    stream = new_stream(n=1)
    stream.on_finished(finished(0, 0, 0, "stop"))
    stream.on_rejected(Rejected(7, 0, "engine_failure", "late"))
    assert stream.error is None
