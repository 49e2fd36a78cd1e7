"""The fields that requests share, with their bounds. null means absent, for every one of them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from sfllm_gateway.openai.forms import ResponseFormat, SchemaOrText, StructuredOutputs

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_BAD_WORDS = 512

Count = Annotated[int, Meta(ge=1)]
TopCount = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Repetition = Annotated[float, Meta(ge=1e-6, le=1e6)]
"""Logits are divided or multiplied by it in float32: far beyond these bounds they would not stay finite."""


class SamplingFields(msgspec.Struct, kw_only=True):
    """How to choose tokens and when to stop."""

    temperature: (
        Annotated[float, Meta(ge=0, le=2, description="0 is greedy; the model's own default, else 1")] | None
    ) = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, description="0 or -1: all tokens")] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    logit_bias: (
        Annotated[dict[str, Bias], Meta(description="token ids and what is added to their logits")] | None
    ) = None
    allowed_token_ids: Annotated[list[int], Meta(min_length=1)] | None = None
    bad_words: Annotated[list[str], Meta(max_length=MAX_BAD_WORDS)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: Count | None = None
    max_new_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    skip_special_tokens: bool | None = None


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextFields(SamplingFields, kw_only=True):
    """Fields of every request of the OpenAI kind."""

    model: str | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, description="goes before max_tokens")] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: Annotated[TopCount, Meta(description="not with stream")] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: Annotated[bool, Meta(description="token:ID for token texts")] | None = None
    truncate_prompt_tokens: (
        Annotated[int, Meta(ge=-1, description="keep so many tokens at the end; -1: as many as fit")] | None
    ) = None
    cache_salt: (
        Annotated[str, Meta(min_length=1, max_length=1024, description="share cached prefixes only with it")]
        | None
    ) = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1, description="lower is served first")] | None = (
        None
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    user: str | None = None
    request_id: Annotated[str, Meta(max_length=128)] | None = None
