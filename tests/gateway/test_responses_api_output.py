"""How output becomes items and events: order, numbers, and the same outcome however it was cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from sfllm_gateway.generation import Update, Usage
from sfllm_gateway.logprobs import TokenReport
from sfllm_gateway.parsing.deltas import CallDelta, Delta
from sfllm_gateway.responses_api.output import Events, Output
from sfllm_gateway.responses_api.parts import Parts

THOUGHT = Delta(reasoning="hm")
TEXT = Delta("Hello")
FIRST_CALL = Delta(calls=[CallDelta(0, "call_a", "f", '{"a"'), CallDelta(0, "", "", ":1}")])
SECOND_CALL = Delta(calls=[CallDelta(1, "call_b", "g", "")])


def read(events: list[bytes]) -> list[dict[str, Any]]:
    found = []
    for event in events:
        first, second, *rest = event.decode().split("\n")
        assert rest == ["", ""]
        data = json.loads(second.removeprefix("data: "))
        assert first == f"event: {data['type']}"
        found.append(data)
    return found


def told(*deltas: Delta, truncated: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The events of an output, and its items."""
    output = Output("x", Events())
    events = [event for delta in deltas for event in output.feed(delta)]
    return read(events + output.finish(truncated)), output.items


def test_all_kinds_of_items_are_told_of_in_the_documented_order() -> None:
    events, items = told(THOUGHT, TEXT, FIRST_CALL, SECOND_CALL)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.done", "output_item.done"),
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call"]
    assert items[2] == {
        "id": "fc_x_2",
        "type": "function_call",
        "status": "completed",
        "call_id": "call_a",
        "name": "f",
        "arguments": '{"a":1}',
    }
    assert items[3]["arguments"] == ""
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == items


def test_an_item_begins_in_progress_and_without_content() -> None:
    events, _ = told(TEXT)
    assert events[0]["item"] == {
        "id": "msg_x_0",
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }
    assert events[1]["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def test_only_the_last_item_of_a_truncated_output_is_incomplete() -> None:
    _, items = told(THOUGHT, FIRST_CALL, truncated=True)
    assert [item["status"] for item in items] == ["completed", "incomplete"]


def test_an_output_of_nothing_is_an_empty_message() -> None:
    _, items = told(Delta())
    assert [part["text"] for part in items[0]["content"]] == [""]


def test_every_event_is_one_that_the_official_client_knows() -> None:
    known: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
    events, _ = told(THOUGHT, TEXT, FIRST_CALL, SECOND_CALL, truncated=True)
    assert [known.validate_python(event).type for event in events] == [event["type"] for event in events]


DELTAS = st.one_of(
    st.builds(Delta, content=st.text(max_size=3)),
    st.builds(Delta, reasoning=st.text(max_size=3)),
    st.builds(
        lambda number, arguments: Delta(calls=[CallDelta(number, "call", "f", arguments)]),
        st.integers(0, 2),
        st.text(max_size=3),
    ),
)


@given(st.lists(DELTAS, max_size=8), st.booleans())
def test_what_a_client_puts_together_from_the_events_is_what_the_items_have(
    deltas: list[Delta], truncated: bool
) -> None:
    events, items = told(*deltas, truncated=truncated)
    built: dict[str, str] = {}
    for event in events:
        if event["type"] == "response.output_item.added":
            built[event["item"]["id"]] = ""
        elif event["type"].endswith(".delta"):
            built[event["item_id"]] += event["delta"]
    assert built == {item["id"]: _text(item) for item in items}
    assert [event["output_index"] for event in events] == sorted(event["output_index"] for event in events)


def _text(item: dict[str, Any]) -> str:
    return item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]


class ThinkParser:
    """Thoughts end at the first "/"; what follows is content without its leading spaces."""

    def __init__(self) -> None:
        self._thinks = True
        self._began = False

    def feed(self, text: str) -> Delta:
        thought = ""
        if self._thinks:
            thought, mark, text = text.partition("/")
            self._thinks = not mark
        if not self._began:
            text = text.lstrip()
            self._began = bool(text)
        return Delta(text, thought)

    def finish(self, reason: str) -> tuple[Delta, str]:
        return Delta(), reason


def report(token: int, offset: int) -> TokenReport:
    return TokenReport(token, -1.0, (), offset)


def update(text: str, reports: list[TokenReport]) -> Update:
    return Update(0, text, (), Usage(1, 1), logprobs=reports)


WHOLE = "hm/  Rome"
TOKENS = [report(number, offset) for number, offset in enumerate((0, 2, 3, 5, 7, 8))]
"""The fourth token begins with the content, the third is the white space before it."""


@given(st.sets(st.integers(1, len(TOKENS) - 1)))
def test_reports_go_with_the_content_that_their_tokens_made(cuts: set[int]) -> None:
    parts = Parts(ThinkParser())
    bounds = [0, *sorted(cuts), len(TOKENS)]
    pieces = []
    for begin, end in itertools.pairwise(bounds):
        until = TOKENS[end].offset if end < len(TOKENS) else len(WHOLE)
        pieces += parts.feed(update(WHOLE[TOKENS[begin].offset : until], TOKENS[begin:end]))
    rest, reason = parts.finish("stop")
    assert "".join(piece.delta.content for piece in pieces) == "Rome"
    assert [report.token for piece in pieces for report in piece.reports] == [3, 4, 5]
    assert (rest.reports, reason) == ([], "stop")


def test_without_a_parser_all_reports_are_told_with_text_or_at_the_end() -> None:
    parts = Parts(None)
    pieces = [*parts.feed(update("", TOKENS[:1])), *parts.feed(update("ab", TOKENS[1:2]))]
    pieces += parts.feed(update("", TOKENS[2:3]))
    rest, _ = parts.finish("stop")
    assert [[report.token for report in piece.reports] for piece in pieces] == [[], [0, 1], []]
    assert [report.token for report in rest.reports] == [2]
