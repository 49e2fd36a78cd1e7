"""The bodies of answers that are not streamed, and of the lists of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from sfllm.messages import ModelCard
from sfllm_gateway.generation import Update, Usage
from sfllm_gateway.version import VERSION

SYSTEM_FINGERPRINT = f"sfllm-{VERSION}"

_encode = msgspec.json.Encoder().encode


class Envelope(NamedTuple):
    """What every answer begins with. `created` is in unix seconds."""

    id: str
    created: int
    model: str


def chat_body(envelope: Envelope, updates: Sequence[Update], usage: Usage) -> bytes:
    """A `chat.completion`."""
    choices = [
        {
            "index": update.choice,
            "message": {"role": "assistant", "content": update.text, "refusal": None},
            "logprobs": None,
            "finish_reason": update.finish_reason,
        }
        for update in updates
    ]
    return _body(envelope, "chat.completion", choices, usage)


def completion_body(envelope: Envelope, updates: Sequence[Update], usage: Usage) -> bytes:
    """A `text_completion`."""
    choices = [
        {
            "index": update.choice,
            "text": update.text,
            "logprobs": None,
            "finish_reason": update.finish_reason,
        }
        for update in updates
    ]
    return _body(envelope, "text_completion", choices, usage)


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


def _body(envelope: Envelope, kind: str, choices: Sequence[dict[str, Any]], usage: Usage) -> bytes:
    return _encode(
        {
            "id": envelope.id,
            "object": kind,
            "created": envelope.created,
            "model": envelope.model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
            "choices": choices,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            },
        }
    )
