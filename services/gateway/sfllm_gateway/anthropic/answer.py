"""Answers of `POST /v1/messages`, as one message and as its events.

The events are those of Anthropic's documentation, in its order: message_start, for each content block
content_block_start, its deltas and content_block_stop, and at the end message_delta with the reason and
the usage, and message_stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from sfllm.errors import ServiceError
from sfllm.wire import DECODE_ERRORS
from sfllm_gateway.anthropic.errors import error_fields
from sfllm_gateway.generation import Generation, Update, Usage
from sfllm_gateway.parsing.deltas import CallDelta, Delta, PlainParser

ID_PREFIX = "msg_"

SIGNATURE = "sfllm"
"""Of thinking blocks. Clients send them back only with a signature; this one proves nothing."""

PING = b'event: ping\ndata: {"type":"ping"}\n\n'

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

_encode = msgspec.json.Encoder().encode


def event(kind: str, fields: dict[str, Any]) -> bytes:
    """One server-sent event. Its type is in its data too."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), _encode({"type": kind, **fields}))


def usage_json(usage: Usage) -> dict[str, int]:
    """Anthropic's usage: input tokens that were in the cache are counted apart from the others."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


class MessagesAnswer:
    """The answer `name` to one request. With `hides_thinking`, thinking blocks come without their text."""

    def __init__(self, name: str, generation: Generation, hides_thinking: bool = False) -> None:
        self._parser = PlainParser() if generation.parsers is None else generation.parsers(name)
        self._blocks = _Blocks(hides_thinking)
        self._message: dict[str, Any] = {
            "id": name,
            "type": "message",
            "role": "assistant",
            "model": generation.model.card.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._prompt_tokens = sum(map(len, generation.prompts))
        self._ending: dict[str, Any] = {}

    def first(self, choices: int) -> bytes:  # noqa: ARG002 - a message has one choice
        """The message without content. How much of its prompt was cached is known at the end."""
        usage = usage_json(Usage(self._prompt_tokens, 0))
        return event("message_start", {"message": {**self._message, "usage": usage}}) + PING

    def event(self, update: Update) -> bytes:
        """What the text turned out to be, and the end of the last block with the last of it."""
        events = self._blocks.events(self._parser.feed(update.text))
        if update.finish_reason is not None:
            rest, reason = self._parser.finish(update.finish_reason)
            events += self._blocks.events(rest) + self._blocks.close()
            self._ending = _ending(update, reason, self._blocks.called)
        return b"".join(events)

    def last(self, usage: Usage) -> bytes:
        """The reason and the usage."""
        delta = event("message_delta", {"delta": self._ending, "usage": usage_json(usage)})
        return delta + event("message_stop", {})

    def failed(self, error: ServiceError) -> bytes:
        """The error, after which nothing comes."""
        return event("error", error_fields(error))

    def whole(self, updates: Sequence[Update], usage: Usage) -> bytes:
        """The message."""
        (update,) = updates
        first = self._parser.feed(update.text)
        rest, reason = self._parser.finish(update.finish_reason or "stop")
        calls = [*first.calls, *rest.calls]
        content = self._blocks.whole(first.content + rest.content, first.reasoning + rest.reasoning, calls)
        ending = _ending(update, reason, any(block["type"] == "tool_use" for block in content))
        return _encode({**self._message, "content": content, **ending, "usage": usage_json(usage)})


def _ending(update: Update, reason: str, called: bool) -> dict[str, Any]:
    """Why the message ended. Here a call is the reason even where the client said which to make."""
    if reason == "stop" and isinstance(update.matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": update.matched}
    kind = "tool_calls" if called and reason == "stop" else reason
    return {"stop_reason": STOP_REASONS[kind], "stop_sequence": None}


class _Blocks:
    """Cuts what a choice says into content blocks. Invariant: `_kind` is that of the open one, if any."""

    def __init__(self, hides_thinking: bool) -> None:
        self._hides_thinking = hides_thinking
        self._index = -1
        self._kind: tuple[str, int] | None = None
        self.called = False

    def events(self, delta: Delta) -> list[bytes]:
        """The events of further output; thinking comes before text, and text before calls."""
        found: list[bytes] = []
        if delta.reasoning:
            found += self._enter(("thinking", 0), {"thinking": "", "signature": ""})
            if not self._hides_thinking:
                found.append(self._delta("thinking_delta", thinking=delta.reasoning))
        if delta.content:
            found += self._enter(("text", 0), {"text": ""})
            found.append(self._delta("text_delta", text=delta.content))
        for call in delta.calls:
            self.called = True
            found += self._enter(("tool_use", call.number), {"id": call.id, "name": call.name, "input": {}})
            if call.arguments:
                found.append(self._delta("input_json_delta", partial_json=call.arguments))
        return found

    def close(self) -> list[bytes]:
        """The end of the open block."""
        if self._kind is None:
            return []
        found = []
        if self._kind[0] == "thinking":
            found.append(self._delta("signature_delta", signature=SIGNATURE))
        found.append(event("content_block_stop", {"index": self._index}))
        self._kind = None
        return found

    def whole(self, content: str, reasoning: str, calls: Sequence[CallDelta]) -> list[dict[str, Any]]:
        """All blocks of a message. A call that was cut off is left out: it could not be made."""
        found: list[dict[str, Any]] = []
        if reasoning:
            shown = "" if self._hides_thinking else reasoning
            found.append({"type": "thinking", "thinking": shown, "signature": SIGNATURE})
        if content:
            found.append({"type": "text", "text": content})
        return found + _tool_uses(calls)

    def _enter(self, kind: tuple[str, int], fields: dict[str, Any]) -> list[bytes]:
        """The events that lead into a block, unless it is the open one."""
        if self._kind == kind:
            return []
        found = self.close()
        self._kind = kind
        self._index += 1
        block = {"type": kind[0], **fields}
        return [*found, event("content_block_start", {"index": self._index, "content_block": block})]

    def _delta(self, kind: str, **fields: str) -> bytes:
        return event("content_block_delta", {"index": self._index, "delta": {"type": kind, **fields}})


def _tool_uses(calls: Sequence[CallDelta]) -> list[dict[str, Any]]:
    names: dict[int, tuple[str, str]] = {}
    arguments: dict[int, str] = {}
    for call in calls:
        names.setdefault(call.number, (call.id, call.name))
        arguments[call.number] = arguments.get(call.number, "") + call.arguments
    found = []
    for number, (identity, name) in names.items():
        try:
            given = msgspec.json.decode(arguments[number] or "{}", type=dict[str, Any])
        except DECODE_ERRORS:
            continue
        found.append({"type": "tool_use", "id": identity, "name": name, "input": given})
    return found
