"""A chat's choices while they are answered: what their text turned out to be, with its tokens' reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sfllm.wire import DECODE_ERRORS
from sfllm_gateway.generation import Update
from sfllm_gateway.logprobs import TokenReport
from sfllm_gateway.parsing.deltas import CallDelta, Delta, OutputParser
from sfllm_gateway.parsing.thoughts import ThoughtCounter


class Part(NamedTuple):
    """News of one choice for its client. `update` has the reports and ids of the tokens behind it."""

    delta: Delta
    update: Update


class ChoiceParts:
    """Reads the choices of one answer. What a parser holds back takes along the reports of its tokens."""

    def __init__(
        self, make_parser: Callable[[str], OutputParser], name: str, token_bytes: Callable[[int], bytes]
    ) -> None:
        self._make_parser = make_parser
        self._name = name
        self._token_bytes = token_bytes
        self._thoughts: dict[int, ThoughtCounter] = {}
        self._parsers: dict[int, OutputParser] = {}
        self._reports: dict[int, list[TokenReport]] = {}
        self._ids: dict[int, list[int]] = {}

    def read(self, update: Update) -> Part | None:
        """What a client is to be told; None while it cannot be known what the text will be."""
        choice = update.choice
        parser = self._parsers.get(choice)
        if parser is None:
            parser = self._parsers[choice] = self._make_parser(f"{self._name}-{choice}")
            self._thoughts[choice] = ThoughtCounter(self._token_bytes)
        delta = parser.feed(update.text)
        self._thoughts[choice].add(update.ids, update.text, delta)
        if update.logprobs is not None:
            self._reports.setdefault(choice, []).extend(update.logprobs)
        self._ids.setdefault(choice, []).extend(update.ids)
        if update.finish_reason is not None:
            rest, reason = parser.finish(update.finish_reason)
            delta = _joined(delta, rest)
            update = update._replace(finish_reason=reason)
        elif not (delta.content or delta.reasoning or delta.calls):
            return None
        reports = None if update.logprobs is None else self._reports.pop(choice, [])
        return Part(delta, update._replace(logprobs=reports, ids=self._ids.pop(choice)))

    def reasoning_tokens(self, choice: int | None = None) -> int:
        """Tokens of reasoning so far, of one choice or of all."""
        return sum(counter.tokens for index, counter in self._thoughts.items() if choice in {None, index})


def _joined(first: Delta, last: Delta) -> Delta:
    return Delta(first.content + last.content, first.reasoning + last.reasoning, (*first.calls, *last.calls))


def delta_json(delta: Delta) -> dict[str, Any]:
    """The `delta` of an event."""
    fields: dict[str, Any] = {}
    if delta.reasoning:
        fields["reasoning_content"] = delta.reasoning
    if delta.content:
        fields["content"] = delta.content
    if delta.calls:
        fields["tool_calls"] = [_call_delta(call) for call in delta.calls]
    return fields


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if not call.id:
        return {"index": call.number, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.number, "id": call.id, "type": "function", "function": function}


def message_json(delta: Delta) -> dict[str, Any]:
    """The `message` of a whole answer. A call whose arguments were cut off is left out."""
    calls = whole_calls(delta.calls)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if calls and not delta.content else delta.content,
        "refusal": None,
    }
    if delta.reasoning:
        message["reasoning_content"] = delta.reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def whole_calls(deltas: Sequence[CallDelta]) -> list[dict[str, Any]]:
    """The calls that were completed."""
    pieces: dict[int, list[CallDelta]] = {}
    for delta in deltas:
        pieces.setdefault(delta.number, []).append(delta)
    calls = []
    for parts in pieces.values():
        arguments = "".join(part.arguments for part in parts)
        try:
            json.loads(arguments)
        except DECODE_ERRORS:
            continue
        function = {"name": parts[0].name, "arguments": arguments}
        calls.append({"id": parts[0].id, "type": "function", "function": function})
    return calls
