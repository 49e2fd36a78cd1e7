"""`POST /v1/completions`: the request, and what it asks to generate."""

from __future__ import annotations

from array import array
from typing import Annotated, cast

import msgspec
from msgspec import Meta

from sfllm.messages import Sampling
from sfllm_gateway.generation import Generation, Prompts
from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai.body import bad_value
from sfllm_gateway.openai.fields import TextFields, TopCount
from sfllm_gateway.openai.sampling import (
    BadWords,
    check_text_fields,
    check_token_ids,
    encode_bad_words,
    limits_of,
    make_sampling,
    stop_strings,
    truncate,
)
from sfllm_gateway.openai.structured import form_of, grammar_of
from sfllm_gateway.tokenize import TextPool, decode, encode

DEFAULT_MAX_TOKENS = 16
MAX_TOTAL_CHOICES = 1024
"""Prompts times `n` of one request."""


class CompletionRequest(TextFields, kw_only=True):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str | int | list[int]]
    max_tokens: Annotated[int, Meta(ge=0, description="0 only with echo")] | None = None
    echo: Annotated[bool, Meta(description="begin the answer with the prompt")] | None = None
    logprobs: TopCount | None = None
    add_special_tokens: bool | None = None


decoder = msgspec.json.Decoder(CompletionRequest)


def check(request: CompletionRequest) -> None:
    """Raise 400 for what can be told without the model."""
    check_text_fields(request)
    prompts = split_prompts(request.prompt)
    if len(prompts) * (request.n or 1) > MAX_TOTAL_CHOICES:
        raise bad_value("prompt", f"at most {MAX_TOTAL_CHOICES} choices in one request")
    if limits_of(request, None).wanted == 0 and not request.echo:
        raise bad_value("max_tokens", "0 is only allowed together with echo")


def split_prompts(
    prompt: str | list[str | int | list[int]], param: str = "prompt"
) -> list[str] | list[list[int]]:
    """The prompts of a request, all texts or all token ids. Raises 400 for a mixture or none."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if not kinds:
        raise bad_value(param, "must not be empty")
    if len(kinds) > 1:
        raise bad_value(param, "strings and token ids cannot be mixed")
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    return cast("list[str] | list[list[int]]", prompt)


async def prepare(request: CompletionRequest, model: LoadedModel, pool: TextPool) -> Generation:
    """Tokenize and resolve defaults. Raises 400 for what does not fit the model."""
    given = split_prompts(request.prompt)
    texts = [item for item in given if isinstance(item, str)]
    tokenizer = model.text.tokenizer
    limits = limits_of(request, DEFAULT_MAX_TOKENS)

    def tokens() -> tuple[Prompts, list[str], BadWords]:
        whole = (
            encode(tokenizer, texts, request.add_special_tokens is not False)
            if texts
            else from_ids([item for item in given if isinstance(item, list)], model)
        )
        prompts = [truncate(ids, request.truncate_prompt_tokens, limits, model.card) for ids in whole]
        shown = []
        if request.echo:
            skips = request.skip_special_tokens is not False
            shown = texts if texts and prompts == whole else decode(tokenizer, prompts, skips)
        return prompts, shown, encode_bad_words(tokenizer, request.bad_words)

    prompts, shown, bad_words = await pool.run(tokens)
    grammar = await grammar_of(form_of(request), model)
    return Generation(
        model=model,
        prompts=prompts,
        n=request.n or 1,
        samplings=[_sampling(request, model, len(prompt), bad_words, grammar) for prompt in prompts],
        stops=stop_strings(request.stop),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        priority=request.priority or 0,
        stream=bool(request.stream),
        seeded=request.seed is not None,
        cache_salt=request.cache_salt or "",
        echo=shown if request.echo else None,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        discards=limits.wanted == 0,
    )


def _sampling(
    request: CompletionRequest, model: LoadedModel, prompt_tokens: int, bad_words: BadWords, grammar: str
) -> Sampling:
    limits = limits_of(request, DEFAULT_MAX_TOKENS)
    bounds = limits.resolve(model.card, prompt_tokens, "prompt")
    scored = request.logprobs if request.echo else None
    wanted = [count for count in (request.prompt_logprobs, scored) if count is not None]
    sampling = make_sampling(
        *(request, model.card, bounds, bad_words),
        logprobs=request.logprobs,
        prompt_logprobs=max(wanted, default=None),
        grammar=grammar,
    )
    if scored is None or limits.wanted not in {0, 1}:
        return sampling
    # Who scores a prompt asks for one token and counts on it; an end token, left out, would be missing.
    return msgspec.structs.replace(sampling, ignore_eos=True)


def from_ids(given: list[list[int]], model: LoadedModel, param: str = "prompt") -> Prompts:
    """Prompts that were given as token ids. Raises 400 for ids outside the vocabulary."""
    for ids in given:
        check_token_ids(ids, model.card, param)
    return [array("I", ids) for ids in given]
