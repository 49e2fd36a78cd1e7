"""From request fields to `Sampling`: checks that need the model, and defaults of the model and the API."""

from __future__ import annotations

import re
import secrets
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from sfllm.errors import ErrorCode, ServiceError
from sfllm.messages import ModelCard, Sampling
from sfllm_gateway.openai.body import bad_value
from sfllm_gateway.openai.fields import SamplingFields, TextFields
from sfllm_gateway.openai.structured import form_of
from sfllm_gateway.tokenize import encode

GREEDY_BELOW = 1e-5
MAX_STOPS = 16

BadWords = tuple[tuple[int, ...], ...]


def stop_strings(stop: str | list[str] | None, param: str = "stop") -> tuple[str, ...]:
    """The stop strings of a request, checked."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise bad_value(param, f"at most {MAX_STOPS} strings, got {len(stops)}")
    if not all(stops):
        raise bad_value(param, "a stop string must not be empty")
    return stops


def check_text_fields(fields: TextFields) -> None:
    """Raise 400 for what is wrong with fields that every OpenAI endpoint has, whatever the model."""
    stop_strings(fields.stop)
    check_bad_words(fields)
    form_of(fields)
    if fields.stream_options is not None and not fields.stream:
        raise bad_value("stream_options", "only allowed together with stream")
    if fields.prompt_logprobs is not None and fields.stream:
        raise bad_value("prompt_logprobs", "not available together with stream")


def check_bad_words(fields: SamplingFields, path: str = "") -> None:
    """Raise 400 for a word that would forbid nothing or everything."""
    if not all(word.strip() for word in fields.bad_words or ()):
        raise bad_value(f"{path}bad_words", "a word must not be empty")


def check_token_ids(ids: Sequence[int], card: ModelCard, param: str) -> None:
    """Raise 400 unless all ids are in the model's vocabulary."""
    if ids and not 0 <= min(ids) <= max(ids) < card.vocab_size:
        raise bad_value(param, f"token ids must be in 0..{card.vocab_size - 1}")


def encode_bad_words(tokenizer: Tokenizer, words: Sequence[str] | None) -> BadWords:
    """Each word's token ids as they are at the beginning of a text and after a space."""
    if not words:
        return ()
    texts = [form for word in words for form in (word.lstrip(), " " + word.lstrip())]
    return tuple(dict.fromkeys(tuple(ids) for ids in encode(tokenizer, texts, False) if ids))


class TokenLimits(NamedTuple):
    """The fields that bound an output. `path` is where they are inside the body."""

    wanted: int | None
    min_tokens: int
    default: int | None
    path: str = ""

    def resolve(self, card: ModelCard, prompt_tokens: int, param: str) -> tuple[int, int]:
        """`max_tokens` and `min_tokens` that fit. Raises 400 for a prompt that leaves no room."""
        room = card.max_model_len - prompt_tokens
        if prompt_tokens == 0:
            raise bad_value(param, "the prompt has no tokens")
        if room < 1:
            raise ServiceError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {prompt_tokens} tokens, but the model's context is {card.max_model_len} "
                "tokens for prompt and output together",
                param=param,
            )
        wanted = self.wanted if self.wanted is not None else self.default
        if wanted is not None and self.min_tokens > max(wanted, 1):
            raise bad_value(f"{self.path}min_tokens", f"{self.min_tokens} is more than max_tokens, {wanted}")
        most = room if wanted is None else max(min(wanted, room), 1)
        return most, min(self.min_tokens, most)


def limits_of(fields: TextFields, default_max: int | None) -> TokenLimits:
    """The output's bounds; the most specific name of the maximum wins."""
    names = (fields.max_completion_tokens, fields.max_tokens, fields.max_new_tokens)
    wanted = next((value for value in names if value is not None), None)
    return TokenLimits(wanted, fields.min_tokens or 0, default_max)


def truncate(prompt: array[int], wanted: int | None, limits: TokenLimits, card: ModelCard) -> array[int]:
    """The last `wanted` tokens of a prompt; -1 keeps what leaves room for the output that was asked for."""
    if wanted is None:
        return prompt
    if wanted < 0:
        output = limits.wanted if limits.wanted is not None else limits.default
        wanted = max(card.max_model_len - max(output or 1, 1), 1)
    return prompt[max(len(prompt) - wanted, 0) :]


def make_sampling(
    fields: SamplingFields,
    card: ModelCard,
    limits: tuple[int, int],
    bad_words: BadWords,
    path: str = "",
    *,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: str = "",
) -> Sampling:
    """How to sample; `limits` are max_tokens and min_tokens. The seed is drawn if there is none.

    `path` is where the fields are inside the body. Raises 400 for token ids outside the vocabulary.
    """
    defaults = card.defaults
    temperature = _first(fields.temperature, defaults.temperature, 1.0)
    top_k = _first(fields.top_k, defaults.top_k, 0)
    check_token_ids(fields.stop_token_ids or (), card, f"{path}stop_token_ids")
    check_token_ids(fields.allowed_token_ids or (), card, f"{path}allowed_token_ids")
    _check_tokens_left(fields, card, limits, bad_words, path)
    return Sampling(
        max_tokens=limits[0],
        seed=secrets.randbits(63) if fields.seed is None else fields.seed,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=_first(fields.top_p, defaults.top_p, 1.0),
        top_k=0 if top_k < 0 else min(top_k, card.vocab_size),
        min_p=_first(fields.min_p, defaults.min_p, 0.0),
        min_tokens=limits[1],
        ignore_eos=bool(fields.ignore_eos),
        stop_token_ids=_distinct(fields.stop_token_ids),
        frequency_penalty=fields.frequency_penalty or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        repetition_penalty=_first(fields.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=_logit_bias(fields.logit_bias or {}, card, f"{path}logit_bias"),
        allowed_token_ids=_distinct(fields.allowed_token_ids),
        bad_words=bad_words,
        logprobs=_candidates(logprobs, card),
        prompt_logprobs=_candidates(prompt_logprobs, card),
        grammar=grammar,
    )


def _check_tokens_left(
    fields: SamplingFields, card: ModelCard, limits: tuple[int, int], bad_words: BadWords, path: str
) -> None:
    """Raise 400 if rules could at some time forbid every token that is allowed."""
    forbidden = {word[-1] for word in bad_words}
    if limits[1]:
        forbidden |= {*card.eos_token_ids, *(fields.stop_token_ids or ())}
    if fields.allowed_token_ids is not None and forbidden.issuperset(fields.allowed_token_ids):
        raise bad_value(f"{path}allowed_token_ids", "bad_words and min_tokens can forbid all of them")
    if len(forbidden) >= card.vocab_size:
        raise bad_value(f"{path}stop_token_ids", "with bad_words and min_tokens no token is left")


def _logit_bias(bias: dict[str, float], card: ModelCard, param: str) -> tuple[tuple[int, float], ...]:
    if not all(re.fullmatch(r"\d{1,10}", token, re.ASCII) for token in bias):
        raise bad_value(param, "its names must be token ids")
    found = {int(token): value for token, value in bias.items()}
    check_token_ids(tuple(found), card, param)
    return tuple(found.items())


def _distinct(ids: Iterable[int] | None) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids or ()))


def _candidates(wanted: int | None, card: ModelCard) -> int:
    """How many of the likeliest tokens to report, -1 for no report at all."""
    return -1 if wanted is None else min(wanted, card.vocab_size)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
