"""`POST /v1/completions`: the request, and what it asks to generate."""

from __future__ import annotations

from array import array
from typing import cast

import msgspec

from sfllm_gateway.generation import Generation, Prompts
from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai.common import (
    TextFields,
    bad_value,
    check_stream_options,
    check_token_ids,
    sampling_of,
    stop_strings,
)
from sfllm_gateway.tokenize import TextPool, encode

DEFAULT_MAX_TOKENS = 16
MAX_TOTAL_CHOICES = 1024
"""Prompts times `n` of one request."""


class CompletionRequest(TextFields, kw_only=True):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str | int | list[int]]
    add_special_tokens: bool | None = None


decoder = msgspec.json.Decoder(CompletionRequest)


def check(request: CompletionRequest) -> None:
    """Raise 400 for what can be told without the model."""
    check_stream_options(request)
    stop_strings(request.stop)
    prompts = split_prompts(request.prompt)
    if len(prompts) * (request.n or 1) > MAX_TOTAL_CHOICES:
        raise bad_value("prompt", f"at most {MAX_TOTAL_CHOICES} choices in one request")


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[str] | list[list[int]]:
    """The prompts of a request, all texts or all token ids. Raises 400 for a mixture or none."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if not kinds:
        raise bad_value("prompt", "must not be empty")
    if len(kinds) > 1:
        raise bad_value("prompt", "strings and token ids cannot be mixed")
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    return cast("list[str] | list[list[int]]", prompt)


async def prepare(request: CompletionRequest, model: LoadedModel, pool: TextPool) -> Generation:
    """Tokenize and resolve defaults. Raises 400 for what does not fit the model."""
    given = split_prompts(request.prompt)
    texts = [item for item in given if isinstance(item, str)]
    if texts:
        adds = request.add_special_tokens is not False
        prompts = await pool.run(lambda: encode(model.text.tokenizer, texts, adds))
    else:
        prompts = _from_ids([item for item in given if isinstance(item, list)], model)
    return Generation(
        model=model,
        prompts=prompts,
        n=request.n or 1,
        samplings=[
            sampling_of(request, model.card, len(prompt), DEFAULT_MAX_TOKENS, "prompt") for prompt in prompts
        ],
        stops=stop_strings(request.stop),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        priority=request.priority or 0,
        stream=bool(request.stream),
    )


def _from_ids(given: list[list[int]], model: LoadedModel) -> Prompts:
    for ids in given:
        check_token_ids(ids, model.card, "prompt")
    return [array("I", ids) for ids in given]
