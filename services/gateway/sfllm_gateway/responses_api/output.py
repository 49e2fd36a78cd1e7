"""The output items of a response, and the events that tell of them as they grow. Pure.

Each item is announced, then its part; deltas follow, and then what was announced is told to be done, in
reverse. OpenAI documents the events: https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from sfllm_gateway.parsing.deltas import CallDelta, Delta

Logprobs = Sequence[dict[str, Any]]

_encode = msgspec.json.Encoder().encode


class Events:
    """Writes events, numbered from 0."""

    def __init__(self) -> None:
        self._next = 0

    def write(self, kind: str, fields: dict[str, Any]) -> bytes:
        """One event. Its type is in its data too."""
        number, self._next = self._next, self._next + 1
        data = _encode({"type": kind, "sequence_number": number, **fields})
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)


class Output:
    """Puts what a choice says into items. `items` are those that are done; at most one more is open."""

    def __init__(self, name: str, events: Events) -> None:
        self.items: list[dict[str, Any]] = []
        self._name = name
        self._events = events
        self._open: _Reasoning | _Message | _Call | None = None

    def feed(self, delta: Delta, logprobs: Logprobs = ()) -> list[bytes]:
        """The events of further output; reasoning comes before text, and text before calls.

        `logprobs` are of the tokens of the text.
        """
        found: list[bytes] = []
        if delta.reasoning:
            found += self._reasoning(delta.reasoning)
        if delta.content:
            found += self._content(delta.content, logprobs)
        for call in delta.calls:
            found += self._call(call)
        return found

    def finish(self, truncated: bool, logprobs: Logprobs = ()) -> list[bytes]:
        """The end of the last item, which is `incomplete` if it was `truncated`.

        `logprobs` are of tokens whose text is not shown. An output of nothing is an empty message.
        """
        found: list[bytes] = []
        if logprobs or (self._open is None and not self.items):
            found += self._content("", logprobs)
        return found + self._close("incomplete" if truncated else "completed")

    def _reasoning(self, text: str) -> list[bytes]:
        found: list[bytes] = []
        item = self._open
        if not isinstance(item, _Reasoning):
            found = self._close("completed")
            item = _Reasoning(f"rs_{self._name}_{len(self.items)}", len(self.items), self._events)
            self._open = item
            found += item.begin()
        return [*found, item.add(text)]

    def _content(self, text: str, logprobs: Logprobs) -> list[bytes]:
        found: list[bytes] = []
        item = self._open
        if not isinstance(item, _Message):
            found = self._close("completed")
            item = _Message(f"msg_{self._name}_{len(self.items)}", len(self.items), self._events)
            self._open = item
            found += item.begin()
        return [*found, item.add(text, logprobs)] if text or logprobs else found

    def _call(self, call: CallDelta) -> list[bytes]:
        found: list[bytes] = []
        item = self._open
        if not isinstance(item, _Call) or item.number != call.number:
            found = self._close("completed")
            item = _Call(f"fc_{self._name}_{len(self.items)}", len(self.items), self._events, call)
            self._open = item
            found += item.begin()
        return [*found, item.add(call.arguments)] if call.arguments else found

    def _close(self, status: str) -> list[bytes]:
        if self._open is None:
            return []
        found = self._open.end(status)
        self.items.append(self._open.json(status))
        self._open = None
        return found


class _Reasoning:
    """What the model thinks, in one part."""

    def __init__(self, identity: str, index: int, events: Events) -> None:
        self._id, self._index, self._events = identity, index, events
        self._place = {"item_id": identity, "output_index": index, "content_index": 0}
        self._pieces: list[str] = []

    def begin(self) -> list[bytes]:
        item = {**self.json("in_progress"), "content": []}
        return [
            self._events.write("response.output_item.added", {"output_index": self._index, "item": item}),
            self._events.write("response.content_part.added", {**self._place, "part": self._part()}),
        ]

    def add(self, text: str) -> bytes:
        self._pieces.append(text)
        return self._events.write("response.reasoning_text.delta", {**self._place, "delta": text})

    def end(self, status: str) -> list[bytes]:
        write, part = self._events.write, self._part()
        return [
            write("response.reasoning_text.done", {**self._place, "text": part["text"]}),
            write("response.content_part.done", {**self._place, "part": part}),
            write("response.output_item.done", {"output_index": self._index, "item": self.json(status)}),
        ]

    def json(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "reasoning",
            "status": status,
            "summary": [],
            "content": [self._part()],
            "encrypted_content": None,
        }

    def _part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": "".join(self._pieces)}


class _Message:
    """What the model says, in one part."""

    def __init__(self, identity: str, index: int, events: Events) -> None:
        self._id, self._index, self._events = identity, index, events
        self._place = {"item_id": identity, "output_index": index, "content_index": 0}
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def begin(self) -> list[bytes]:
        item = {**self.json("in_progress"), "content": []}
        return [
            self._events.write("response.output_item.added", {"output_index": self._index, "item": item}),
            self._events.write("response.content_part.added", {**self._place, "part": self._part()}),
        ]

    def add(self, text: str, logprobs: Logprobs) -> bytes:
        self._pieces.append(text)
        self._logprobs += logprobs
        fields = {**self._place, "delta": text, "logprobs": logprobs}
        return self._events.write("response.output_text.delta", fields)

    def end(self, status: str) -> list[bytes]:
        write, part = self._events.write, self._part()
        done = {**self._place, "text": part["text"], "logprobs": part["logprobs"]}
        return [
            write("response.output_text.done", done),
            write("response.content_part.done", {**self._place, "part": part}),
            write("response.output_item.done", {"output_index": self._index, "item": self.json(status)}),
        ]

    def json(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [self._part()],
        }

    def _part(self) -> dict[str, Any]:
        text = "".join(self._pieces)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}


class _Call:
    """A call of a function, the `number`th of the choice."""

    def __init__(self, identity: str, index: int, events: Events, first: CallDelta) -> None:
        self._id, self._index, self._events = identity, index, events
        self._place = {"item_id": identity, "output_index": index}
        self._call_id, self._name, self.number = first.id, first.name, first.number
        self._pieces: list[str] = []

    def begin(self) -> list[bytes]:
        added = {"output_index": self._index, "item": self.json("in_progress")}
        return [self._events.write("response.output_item.added", added)]

    def add(self, text: str) -> bytes:
        self._pieces.append(text)
        return self._events.write("response.function_call_arguments.delta", {**self._place, "delta": text})

    def end(self, status: str) -> list[bytes]:
        item = self.json(status)
        done = {**self._place, "name": self._name, "arguments": item["arguments"]}
        return [
            self._events.write("response.function_call_arguments.done", done),
            self._events.write("response.output_item.done", {"output_index": self._index, "item": item}),
        ]

    def json(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._pieces),
        }
