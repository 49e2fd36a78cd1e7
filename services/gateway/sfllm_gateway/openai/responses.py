"""The bodies of answers that are not streamed, and of the lists of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from sfllm.messages import ModelCard
from sfllm.version import VERSION
from sfllm_gateway.generation import Prompts, Update, Usage
from sfllm_gateway.openai.chat_parts import Part, message_json
from sfllm_gateway.openai.token_json import (
    TokenNames,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)

SYSTEM_FINGERPRINT = f"sfllm-{VERSION}"

_encode = msgspec.json.Encoder().encode


class AnswerForm(NamedTuple):
    """What all events and bodies of one answer share. `created` is in unix seconds.

    `prompts`, with `n` choices each, are set when the client wants token ids beside texts.
    """

    id: str
    created: int
    model: str
    names: TokenNames
    prompts: Prompts | None = None
    n: int = 1


def chat_body(
    form: AnswerForm,
    updates: Sequence[Update],
    usage: Usage,
    parts: Sequence[Part | None] | None = None,
    reasoning_tokens: int | None = None,
) -> bytes:
    """A `chat.completion`. `parts` are what the updates turned out to be, None where all is content.

    `reasoning_tokens` are None where none are looked for.
    """
    messages = [{"role": "assistant", "content": update.text, "refusal": None} for update in updates]
    if parts is not None:
        read = [part for part in parts if part is not None]
        messages, updates = [message_json(part.delta) for part in read], [part.update for part in read]
    choices = [
        {
            "index": update.choice,
            "message": message,
            "logprobs": None if update.logprobs is None else chat_logprobs(update.logprobs, form.names),
            "finish_reason": update.finish_reason,
            **_token_ids(form, update),
        }
        for message, update in zip(messages, updates, strict=True)
    ]
    more: dict[str, Any] = {}
    if form.prompts is not None:
        more["prompt_token_ids"] = list(form.prompts[0])
    if updates[0].prompt_logprobs is not None:
        more["prompt_logprobs"] = prompt_logprobs(updates[0].prompt_logprobs, form.names)
    details = None if reasoning_tokens is None else {"reasoning_tokens": reasoning_tokens}
    return _body(form, "chat.completion", choices, usage, more, details)


def completion_body(form: AnswerForm, updates: Sequence[Update], usage: Usage) -> bytes:
    """A `text_completion`."""
    choices = []
    for update in updates:
        logprobs = update.logprobs
        choice = {
            "index": update.choice,
            "text": update.text,
            "logprobs": None if logprobs is None else completion_logprobs(logprobs, form.names),
            "finish_reason": update.finish_reason,
            **_token_ids(form, update),
        }
        if form.prompts is not None:
            choice["prompt_token_ids"] = list(form.prompts[update.choice // form.n])
        if update.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(update.prompt_logprobs, form.names)
        choices.append(choice)
    return _body(form, "text_completion", choices, usage, {})


def _token_ids(form: AnswerForm, update: Update) -> dict[str, Any]:
    return {} if form.prompts is None else {"token_ids": list(update.ids)}


def model_json(name: str, card: ModelCard) -> dict[str, Any]:
    """One entry of `GET /v1/models`."""
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "sfllm",
        "root": card.root,
        "parent": None,
        "max_model_len": card.max_model_len,
        "permission": [],
    }


def _body(
    form: AnswerForm,
    kind: str,
    choices: Sequence[dict[str, Any]],
    usage: Usage,
    more: dict[str, Any],
    details: dict[str, Any] | None = None,
) -> bytes:
    return _encode(
        {
            "id": form.id,
            "object": kind,
            "created": form.created,
            "model": form.model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
            "choices": choices,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
                **({} if details is None else {"completion_tokens_details": details}),
            },
            **more,
        }
    )
