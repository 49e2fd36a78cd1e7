"""The least that must be read of a streamed answer to take its times. Pure: bytes in, arrivals out.

The client shares the machine with what it measures, so every microsecond a token counts: lines are
cut out of whole reads, and only the fields that matter are decoded.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sfllm_cli.client import MAX_EVENT_BYTES, ServerError


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class AnswerReader:
    """Takes the bytes of one answer as they come, and keeps when output came and the usage."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.prompt_tokens = 0
        self.output_tokens: int | None = None
        self.is_complete = False
        self._partial = b""

    def feed(self, data: bytes, now: float) -> None:
        """Read what came at `now`. Raises `ServerError` for an error or what is no answer."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > MAX_EVENT_BYTES:
            raise ServerError(f"a line is longer than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.is_complete = True
            return
        try:
            event = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ServerError(f"an event is not what was expected ({error}): {data[:100]!r}") from error
        if event.error is not None:
            message = event.error.get("message") if isinstance(event.error, dict) else event.error
            raise ServerError(str(message)[:300])
        if event.usage is not None:
            self.prompt_tokens = event.usage.prompt_tokens
            self.output_tokens = event.usage.completion_tokens
        # Some servers send no [DONE] after the reason of the end.
        self.is_complete |= any(choice.finish_reason is not None for choice in event.choices)
        # An event with only the role, the reason of the end or the usage brings no output.
        if any(_has_text(choice) for choice in event.choices):
            self.arrivals.append(now)


def _has_text(choice: _Choice) -> bool:
    delta = choice.delta
    return bool(choice.text or (delta is not None and (delta.content or delta.reasoning_content)))
