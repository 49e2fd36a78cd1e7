"""What the load client reads of a streamed answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfllm_cli.bench.stream import AnswerReader
from sfllm_cli.client import MAX_EVENT_BYTES, ServerError

EVENTS = (
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"index": 0, "delta": {"content": "Grüße 🙂"}, "logprobs": None}]},
    {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]},
    {"choices": [{"index": 0, "text": " x", "finish_reason": None}]},
    {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}], "usage": None},
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}},
)
ANSWER = b": hello\r\n\r\n" + b"".join(
    b"event: m\r\ndata: " + json.dumps(event, ensure_ascii=False).encode() + b"\r\n\r\n" for event in EVENTS
)
DONE = b"data: [DONE]\n\n"


@given(st.lists(st.integers(0, len(ANSWER + DONE)), max_size=20))
def test_an_answer_means_the_same_however_it_is_cut(cuts: list[int]) -> None:
    whole, reader, start = ANSWER + DONE, AnswerReader(), 0
    for index, end in enumerate([*sorted(cuts), len(whole)]):
        reader.feed(whole[start:end], float(index))
        start = end
    assert len(reader.arrivals) == 3
    assert reader.arrivals == sorted(reader.arrivals)
    assert (reader.prompt_tokens, reader.output_tokens, reader.is_complete) == (7, 3, True)


def test_an_arrival_has_the_time_at_which_its_line_was_complete() -> None:
    reader = AnswerReader()
    reader.feed(b'data: {"choices":[{"text":"a', 1.0)
    reader.feed(b'"}]}\ndata: {"choices":[{"text":"b"}]}\n', 2.0)
    assert reader.arrivals == [2.0, 2.0]
    assert (reader.output_tokens, reader.is_complete) == (None, False)


@pytest.mark.parametrize("end", [DONE, b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n'])
def test_an_answer_is_complete_with_its_reason_or_with_the_mark_of_the_end(end: bytes) -> None:
    reader = AnswerReader()
    reader.feed(b'data: {"choices":[{"text":"a","finish_reason":null}]}\n', 0.0)
    assert not reader.is_complete
    reader.feed(end, 1.0)
    assert reader.is_complete


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'data: {"error": {"message": "out of memory"}}\n', "out of memory"),
        (b'data: {"error": "no"}\n', "no"),
        (b"data: {nonsense\n", "not what was expected"),
        (b"data: [1]\n", "not what was expected"),
        (b'data: {"choices": [{"text": "\xff"}]}\n', "not what was expected"),
        (b"x" * (MAX_EVENT_BYTES + 1), "longer than"),
    ],
)
def test_what_is_no_answer_is_an_error(data: bytes, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        AnswerReader().feed(data, 0.0)


@given(st.binary())
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    reader = AnswerReader()
    try:
        reader.feed(b"data: " + data + b"\n", 0.0)
    except ServerError:
        return
    assert len(reader.arrivals) <= data.count(b"\n") + 1
