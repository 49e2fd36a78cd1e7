"""Server-sent events from byte templates: all that does not change is encoded once a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from sfllm.errors import ServiceError
from sfllm_gateway.generation import Update, Usage
from sfllm_gateway.http_io import DONE, failed_stream
from sfllm_gateway.openai.chat_parts import ChoiceParts, delta_json
from sfllm_gateway.openai.responses import SYSTEM_FINGERPRINT, AnswerForm, chat_body, completion_body
from sfllm_gateway.openai.token_json import chat_logprobs, completion_logprobs
from sfllm_gateway.parsing.deltas import OutputParser

_encode = msgspec.json.Encoder().encode


def usage_json(usage: Usage, reasoning_tokens: int | None = None) -> bytes:
    """OpenAI's usage object. `reasoning_tokens` are None where none are looked for."""
    details = b'"prompt_tokens_details":{"cached_tokens":%d}' % usage.cached_tokens
    if reasoning_tokens is not None:
        details += b',"completion_tokens_details":{"reasoning_tokens":%d}' % reasoning_tokens
    return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,%s}' % (
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens + usage.completion_tokens,
        details,
    )


class _EventAnswer:
    """The frame that both kinds of events share. `usage` is null on events unless asked for on each."""

    object_name: bytes

    def __init__(self, form: AnswerForm, include_usage: bool, continuous_usage: bool) -> None:
        self._form = form
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage and include_usage
        self._head = b'data: {"id":%s,"object":"%s","created":%d,"model":%s,"system_fingerprint":%s,' % (
            _encode(form.id),
            self.object_name,
            form.created,
            _encode(form.model),
            _encode(SYSTEM_FINGERPRINT),
        )
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"

    def last(self, usage: Usage) -> bytes:
        """The usage event, if it was asked for."""
        if not self._include_usage:
            return DONE
        told = usage_json(usage, self._reasoning_tokens())
        return b'%s"choices":[],"usage":%s}\n\n%s' % (self._head, told, DONE)

    def failed(self, error: ServiceError) -> bytes:
        """The error."""
        return failed_stream(error)

    def _event(self, update: Update, body: bytes, logprobs: bytes, more: bytes = b"") -> bytes:
        reason = b"null" if update.finish_reason is None else _encode(update.finish_reason)
        if self._form.prompts is not None:
            more += b',"token_ids":%s' % _encode(list(update.ids))
        return b'%s"choices":[{"index":%d,%s,"logprobs":%s,"finish_reason":%s%s}]%s' % (
            self._head,
            update.choice,
            body,
            logprobs,
            reason,
            more,
            self._tail if not self._continuous_usage else self._usage_tail(update),
        )

    def _usage_tail(self, update: Update) -> bytes:
        return b',"usage":%s}\n\n' % usage_json(update.usage, self._reasoning_tokens(update.choice))

    def _reasoning_tokens(self, choice: int | None = None) -> int | None:  # noqa: ARG002 - chats look for them
        """Of a choice or of all; None where none are looked for."""
        return None


class ChatAnswer(_EventAnswer):
    """Answers of `/v1/chat/completions`."""

    object_name = b"chat.completion.chunk"

    def __init__(
        self,
        form: AnswerForm,
        include_usage: bool,
        continuous_usage: bool,
        make_parser: Callable[[str], OutputParser] | None = None,
    ) -> None:
        super().__init__(form, include_usage, continuous_usage)
        self._parts = None if make_parser is None else ChoiceParts(make_parser, form.id, form.names.bytes_of)

    def first(self, choices: int) -> bytes:
        """The role, once for every choice."""
        return b"".join([self._role(index) for index in range(choices)])

    def event(self, update: Update) -> bytes:
        """Further text, and the reason with the last of it."""
        delta = b'{"content":%s}' % _encode(update.text) if update.text else b"{}"
        if self._parts is not None:
            part = self._parts.read(update)
            if part is None:
                return b""
            delta, update = _encode(delta_json(part.delta)), part.update
        logprobs = b"null"
        if update.logprobs:
            logprobs = _encode(chat_logprobs(update.logprobs, self._form.names))
        return self._event(update, b'"delta":%s' % delta, logprobs)

    def whole(self, updates: Sequence[Update], usage: Usage) -> bytes:
        """The whole answer."""
        parts = None if self._parts is None else [self._parts.read(update) for update in updates]
        return chat_body(self._form, updates, usage, parts, self._reasoning_tokens())

    def _reasoning_tokens(self, choice: int | None = None) -> int | None:
        return None if self._parts is None else self._parts.reasoning_tokens(choice)

    def _role(self, index: int) -> bytes:
        choice = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,' % index
        prompts = self._form.prompts
        prompt = b"" if prompts is None else b',"prompt_token_ids":%s' % _encode(list(prompts[0]))
        return b'%s"choices":[%s"finish_reason":null}]%s%s' % (self._head, choice, prompt, self._tail)


class CompletionAnswer(_EventAnswer):
    """Answers of `/v1/completions`."""

    object_name = b"text_completion"

    def __init__(self, form: AnswerForm, include_usage: bool, continuous_usage: bool) -> None:
        super().__init__(form, include_usage, continuous_usage)
        self._begun: set[int] = set()

    def first(self, choices: int) -> bytes:  # noqa: ARG002 - chat needs it
        """Nothing: completions have no role to announce."""
        return b""

    def event(self, update: Update) -> bytes:
        """Further text, and the reason with the last of it."""
        logprobs = b"null"
        if update.logprobs:
            logprobs = _encode(completion_logprobs(update.logprobs, self._form.names))
        return self._event(update, b'"text":%s' % _encode(update.text), logprobs, self._prompt(update.choice))

    def whole(self, updates: Sequence[Update], usage: Usage) -> bytes:
        """The whole answer."""
        return completion_body(self._form, updates, usage)

    def _prompt(self, choice: int) -> bytes:
        """The prompt's ids, in the first event of a choice if they were asked for."""
        prompts = self._form.prompts
        if prompts is None or choice in self._begun:
            return b""
        self._begun.add(choice)
        return b',"prompt_token_ids":%s' % _encode(list(prompts[choice // self._form.n]))
