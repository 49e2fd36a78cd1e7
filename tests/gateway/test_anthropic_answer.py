"""How what a model says becomes content blocks, and their events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sfllm_gateway.anthropic.answer import SIGNATURE, MessagesAnswer
from sfllm_gateway.generation import Generation, Update, Usage
from sfllm_gateway.parsing.deltas import CallDelta, Delta


class Script:
    """A parser that takes each text for the name of a step, so that a test says what the model said."""

    def __init__(self, steps: dict[str, Delta], reason: str | None = None, rest: Delta = Delta()) -> None:  # noqa: B008 - a tuple of constants
        self._steps = steps
        self._reason = reason
        self._rest = rest

    def feed(self, text: str) -> Delta:
        """The step of this name; several of them, joined by commas, at once."""
        found = [self._steps[name] for name in text.split(",") if name]
        return Delta(
            "".join(delta.content for delta in found),
            "".join(delta.reasoning for delta in found),
            [call for delta in found for call in delta.calls],
        )

    def finish(self, reason: str) -> tuple[Delta, str]:
        """What was held back."""
        return self._rest, self._reason or reason


STEPS = {
    "think": Delta(reasoning="Hm. "),
    "more": Delta(reasoning="Yes."),
    "say": Delta("I look"),
    "on": Delta(" up."),
    "call": Delta(calls=[CallDelta(0, "call_1", "look", "")]),
    "args": Delta(calls=[CallDelta(0, "", "", '{"at":')]),
    "rest": Delta(calls=[CallDelta(0, "", "", '"sky"}')]),
    "second": Delta(calls=[CallDelta(1, "call_2", "wait", "{}")]),
    "nothing": Delta(),
}
THINKING = {"type": "thinking", "thinking": "Hm. Yes.", "signature": SIGNATURE}
TEXT = {"type": "text", "text": "I look up."}
FIRST = {"type": "tool_use", "id": "call_1", "name": "look", "input": {"at": "sky"}}
SECOND = {"type": "tool_use", "id": "call_2", "name": "wait", "input": {}}


def answer(script: Script, hides_thinking: bool = False) -> MessagesAnswer:
    model = cast("Any", SimpleNamespace(card=SimpleNamespace(name="tiny")))
    generation = Generation(model, [], 1, [], parsers=lambda _name: script)
    return MessagesAnswer("msg_1", generation, hides_thinking)


def update(text: str, reason: str | None = None) -> Update:
    return Update(0, text, (), Usage(3, 4), reason)


def streamed(found: MessagesAnswer, steps: Sequence[str], reason: str = "stop") -> list[dict[str, Any]]:
    """The events of the blocks and of the end."""
    parts = [found.event(update(step)) for step in steps[:-1]]
    parts += [found.event(update(steps[-1], reason)), found.last(Usage(3, 4))]
    lines = b"".join(parts).decode().splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def rebuilt(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks as a client puts them together; their order is checked."""
    blocks: list[dict[str, Any]] = []
    parts: list[str] = []
    is_open = False
    for event in events:
        if event["type"] == "content_block_start":
            assert (is_open, event["index"]) == (False, len(blocks))
            is_open, parts = True, []
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            assert (is_open, event["index"]) == (True, len(blocks) - 1)
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                parts.append(delta["partial_json"])
            else:
                name = delta["type"].removesuffix("_delta")
                blocks[-1][name] += delta[name]
        elif event["type"] == "content_block_stop":
            assert (is_open, event["index"]) == (True, len(blocks) - 1)
            is_open = False
            if parts:
                blocks[-1]["input"] = json.loads("".join(parts))
    assert not is_open
    return blocks


@pytest.mark.parametrize(
    ("steps", "blocks"),
    [
        (["say", "on"], [TEXT]),
        (["think", "more", "say", "on"], [THINKING, TEXT]),
        (["think", "more"], [THINKING]),
        (["call", "args", "rest"], [FIRST]),
        (["say", "on", "call", "args", "rest", "second"], [TEXT, FIRST, SECOND]),
        (["think", "more", "say", "on", "call", "args", "rest", "second"], [THINKING, TEXT, FIRST, SECOND]),
        (["nothing"], []),
    ],
)
def test_the_blocks_are_the_same_streamed_in_any_pieces_and_whole(
    steps: list[str], blocks: list[dict[str, Any]]
) -> None:
    assert rebuilt(streamed(answer(Script(STEPS)), steps)) == blocks
    assert rebuilt(streamed(answer(Script(STEPS)), [",".join(steps)])) == blocks
    whole = json.loads(answer(Script(STEPS)).whole([update(",".join(steps), "stop")], Usage(3, 4)))
    assert whole["content"] == blocks


def test_what_the_parser_held_back_comes_before_the_end() -> None:
    script = Script(STEPS, rest=Delta(" up."))
    assert rebuilt(streamed(answer(script), ["say"])) == [TEXT]
    assert json.loads(answer(script).whole([update("say", "stop")], Usage(3, 4)))["content"] == [TEXT]


def test_thinking_that_is_to_be_left_out_leaves_its_block() -> None:
    empty = {**THINKING, "thinking": ""}
    assert rebuilt(streamed(answer(Script(STEPS), True), ["think", "say", "on"])) == [empty, TEXT]
    whole = answer(Script(STEPS), True).whole([update("think,say,on", "stop")], Usage(3, 4))
    assert json.loads(whole)["content"] == [empty, TEXT]


@pytest.mark.parametrize(
    ("reason", "told"), [("stop", "end_turn"), ("length", "max_tokens"), ("tool_calls", "tool_use")]
)
def test_the_parser_says_why_it_ended(reason: str, told: str) -> None:
    script = Script(STEPS, reason=reason)
    events = streamed(answer(script), ["say"])
    assert events[-2]["delta"] == {"stop_reason": told, "stop_sequence": None}
    assert json.loads(answer(script).whole([update("say", "stop")], Usage(3, 4)))["stop_reason"] == told


def test_a_call_is_the_reason_even_where_the_client_named_it() -> None:
    """Parsers give "stop" for a call that was named, as OpenAI does."""
    script = Script(STEPS, reason="stop")
    events = streamed(answer(script), ["call", "args", "rest"])
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    whole = answer(script).whole([update("call,args,rest", "stop")], Usage(3, 4))
    assert json.loads(whole)["stop_reason"] == "tool_use"


def test_a_call_that_was_cut_off_is_left_out_of_a_whole_answer() -> None:
    whole = answer(Script(STEPS)).whole([update("say,on,call,args", "length")], Usage(3, 4))
    found = json.loads(whole)
    assert (found["content"], found["stop_reason"]) == ([TEXT], "max_tokens")
