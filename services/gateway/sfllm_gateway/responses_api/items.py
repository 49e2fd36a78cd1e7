"""From the items of a request to the messages of a chat. Pure.

Reasoning, text and calls of the model that follow each other are one message of the assistant, as chat
templates want it; each result of a call is a message of the role tool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sfllm.errors import quote
from sfllm_gateway.openai.body import bad_value
from sfllm_gateway.openai.chat import ChatMessage, ContentPart
from sfllm_gateway.openai.tool_fields import CalledFunction, ToolCall
from sfllm_gateway.responses_api.fields import KEEPS_NOTHING, Item, Part, ResponsesRequest, unsupported

INPUT_TEXT = frozenset({"input_text", "text"})
OUTPUT_TEXT = frozenset({"output_text", "refusal", "input_text", "text"})
REASONING_TEXT = frozenset({"reasoning_text", "text"})
SUMMARY_TEXT = frozenset({"summary_text"})


class Conversation(NamedTuple):
    """Messages, and the path of the item that each came from."""

    messages: list[ChatMessage]
    origins: list[str]


def conversation(request: ResponsesRequest) -> Conversation:
    """The conversation that the input stands for. Raises 400 or 501 naming the field at fault."""
    reader = _Reader()
    if request.instructions is not None:
        reader.add(ChatMessage(role="system", content=request.instructions), "instructions")
    if isinstance(request.input, str):
        reader.add(ChatMessage(role="user", content=request.input), "input")
    else:
        for number, item in enumerate(request.input):
            reader.read(item, f"input[{number}]")
    return Conversation(reader.messages, reader.origins)


class _Reader:
    """Reads items in order. `_turn` is the message of the assistant that the next item may still add to."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self.origins: list[str] = []
        self._calls: set[str] = set()
        self._turn: ChatMessage | None = None

    def add(self, message: ChatMessage, path: str) -> None:
        """A whole message."""
        self.messages.append(message)
        self.origins.append(path)
        self._turn = None

    def read(self, item: Item, path: str) -> None:
        """The next item. Raises 400 or 501."""
        match item.type or "message":
            case "message":
                self._message(item, path)
            case "reasoning":
                self._reasoning(item, path)
            case "function_call":
                self._call(item, path)
            case "function_call_output":
                self._result(item, path)
            case "item_reference":
                raise unsupported(f"{path}.type", f"{KEEPS_NOTHING}, nor their items: send the item itself")
            case other:
                raise unsupported(f"{path}.type", f"items of type {quote(other)} are not supported")

    def _message(self, item: Item, path: str) -> None:
        if item.role is None:
            raise bad_value(f"{path}.role", "a message needs it")
        if item.content is None:
            raise bad_value(f"{path}.content", "a message needs it")
        if item.role != "assistant":
            content = _content(item.content, INPUT_TEXT, f"{path}.content")
            self.add(ChatMessage(role=item.role, content=content), path)
            return
        content = _content(item.content, OUTPUT_TEXT, f"{path}.content")
        self._assistant(path, begun=("content", "tool_calls")).content = content

    def _reasoning(self, item: Item, path: str) -> None:
        texts = _texts(item.content, REASONING_TEXT, f"{path}.content")
        texts = texts or _texts(item.summary, SUMMARY_TEXT, f"{path}.summary")
        if not texts and item.encrypted_content:
            raise bad_value(f"{path}.encrypted_content", "cannot be read here: send the reasoning's text")
        if texts:
            turn = self._assistant(path, begun=("reasoning_content", "content", "tool_calls"))
            turn.reasoning_content = "\n".join(texts)

    def _call(self, item: Item, path: str) -> None:
        for name in ("call_id", "name", "arguments"):
            if getattr(item, name) is None:
                raise bad_value(f"{path}.{name}", "a function_call needs it")
        assert item.call_id is not None
        assert item.name is not None
        assert item.arguments is not None
        self._calls.add(item.call_id)
        turn = self._assistant(path, begun=())
        function = CalledFunction(name=item.name, arguments=item.arguments)
        call = ToolCall(id=item.call_id, function=function)
        turn.tool_calls = [*(turn.tool_calls or ()), call]

    def _result(self, item: Item, path: str) -> None:
        if item.call_id is None:
            raise bad_value(f"{path}.call_id", "a function_call_output needs it")
        if item.call_id not in self._calls:
            raise bad_value(f"{path}.call_id", f"no function_call {quote(item.call_id)} is before it")
        if item.output is None:
            raise bad_value(f"{path}.output", "a function_call_output needs it")
        content = _content(item.output, INPUT_TEXT, f"{path}.output")
        self.add(ChatMessage(role="tool", content=content, tool_call_id=item.call_id), path)

    def _assistant(self, path: str, begun: Sequence[str]) -> ChatMessage:
        """The message to add to: a new one where the last has one of the parts in `begun` already."""
        turn = self._turn
        if turn is None or any(getattr(turn, part) is not None for part in begun):
            turn = ChatMessage(role="assistant")
            self.add(turn, path)
            self._turn = turn
        return turn


def _content(content: str | list[Part], served: frozenset[str], path: str) -> str | list[ContentPart]:
    """One text as it is, several as parts, which the chat template or the gateway joins."""
    if isinstance(content, str):
        return content
    texts = _texts(content, served, path)
    return texts[0] if len(texts) == 1 else [ContentPart(type="text", text=text) for text in texts]


def _texts(content: str | list[Part] | None, served: frozenset[str], path: str) -> list[str]:
    if content is None or isinstance(content, str):
        return [content] if content else []
    found = []
    for number, part in enumerate(content):
        if part.type not in served:
            raise unsupported(
                f"{path}[{number}].type",
                f"parts of type {quote(part.type)} are not supported here, only {', '.join(sorted(served))}",
            )
        name = "refusal" if part.type == "refusal" else "text"
        text = getattr(part, name)
        if text is None:
            raise bad_value(f"{path}[{number}].{name}", f"a part of type {part.type} needs it")
        found.append(text)
    return found
