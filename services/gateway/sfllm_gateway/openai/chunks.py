"""Server-sent events from byte templates: all that does not change is encoded once a request."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sfllm_gateway.generation import Update, Usage
from sfllm_gateway.openai.responses import SYSTEM_FINGERPRINT, Envelope, chat_body, completion_body

_encode = msgspec.json.Encoder().encode


def usage_json(usage: Usage) -> bytes:
    """OpenAI's usage object."""
    return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,%s}' % (
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens + usage.completion_tokens,
        b'"prompt_tokens_details":{"cached_tokens":%d}' % usage.cached_tokens,
    )


class _EventAnswer:
    """The frame that both kinds of events share. `usage` is null on events unless asked for on each."""

    object_name: bytes

    def __init__(self, envelope: Envelope, include_usage: bool, continuous_usage: bool) -> None:
        self._envelope = envelope
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage and include_usage
        self._head = b'data: {"id":%s,"object":"%s","created":%d,"model":%s,"system_fingerprint":%s,' % (
            _encode(envelope.id),
            self.object_name,
            envelope.created,
            _encode(envelope.model),
            _encode(SYSTEM_FINGERPRINT),
        )
        self._tail = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"

    def last(self, usage: Usage) -> bytes:
        """The usage event, if it was asked for."""
        if not self._include_usage:
            return b""
        return b'%s"choices":[],"usage":%s}\n\n' % (self._head, usage_json(usage))

    def _end(self, usage: Usage) -> bytes:
        if self._continuous_usage:
            return b'}],"usage":%s}\n\n' % usage_json(usage)
        return self._tail


class ChatAnswer(_EventAnswer):
    """Answers of `/v1/chat/completions`."""

    object_name = b"chat.completion.chunk"

    def first(self, choices: int) -> bytes:
        """The role, once for every choice."""
        return b"".join([self._role(index) for index in range(choices)])

    def event(self, update: Update) -> bytes:
        """Further text, and the reason with the last of it."""
        delta = b'{"content":%s}' % _encode(update.text) if update.text else b"{}"
        reason = b"null" if update.finish_reason is None else _encode(update.finish_reason)
        return b'%s"choices":[{"index":%d,"delta":%s,"logprobs":null,"finish_reason":%s%s' % (
            self._head,
            update.choice,
            delta,
            reason,
            self._end(update.usage),
        )

    def whole(self, updates: Sequence[Update], usage: Usage) -> bytes:
        """The whole answer."""
        return chat_body(self._envelope, updates, usage)

    def _role(self, index: int) -> bytes:
        delta = b'{"role":"assistant","content":""}'
        return b'%s"choices":[{"index":%d,"delta":%s,"logprobs":null,"finish_reason":null%s' % (
            self._head,
            index,
            delta,
            self._tail,
        )


class CompletionAnswer(_EventAnswer):
    """Answers of `/v1/completions`."""

    object_name = b"text_completion"

    def first(self, choices: int) -> bytes:  # noqa: ARG002 - chat needs it
        """Nothing: completions have no role to announce."""
        return b""

    def event(self, update: Update) -> bytes:
        """Further text, and the reason with the last of it."""
        reason = b"null" if update.finish_reason is None else _encode(update.finish_reason)
        return b'%s"choices":[{"index":%d,"text":%s,"logprobs":null,"finish_reason":%s%s' % (
            self._head,
            update.choice,
            _encode(update.text),
            reason,
            self._end(update.usage),
        )

    def whole(self, updates: Sequence[Update], usage: Usage) -> bytes:
        """The whole answer."""
        return completion_body(self._envelope, updates, usage)
