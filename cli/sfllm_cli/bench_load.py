"""The requests of a benchmark: prompts and lengths from a seed, and the bodies that carry them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from sfllm_cli.settings import BenchSettings

# Below are special tokens in most vocabularies, above there may be none in a small one.
FIRST_TOKEN_ID, LAST_TOKEN_ID = 100, 999

_WORDS = (
    *("river", "stone", "light", "garden", "winter", "letter", "music", "paper", "window", "mountain"),
    *("silver", "morning", "question", "answer", "bridge", "city", "forest", "number", "summer", "story"),
    *("island", "engine", "market", "season", "village", "ocean", "thunder", "harbour", "field", "table"),
)


class Span(NamedTuple):
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int


class Shape(NamedTuple):
    """The size of one request, in tokens, and the seed of its prompt."""

    prompt_tokens: int
    output_tokens: int
    seed: int


def parse_span(text: str) -> Span:
    """`128` or `16:512`. Raises ValueError when it is empty or starts below one."""
    low, _, high = text.partition(":")
    span = Span(int(low), int(high or low))
    if not 1 <= span.low <= span.high:
        raise ValueError(f"{text}: expected a number of tokens, or a range from low to high such as 16:512")
    return span


def shapes(settings: BenchSettings, count: int) -> Iterator[Shape]:
    """The sizes of `count` requests, the same ones for the same seed. Raises ValueError."""
    prompts, outputs = parse_span(settings.prompt_tokens), parse_span(settings.output_tokens)
    source = random.Random(settings.seed)
    for _ in range(count):
        yield Shape(source.randint(*prompts), source.randint(*outputs), source.getrandbits(32))


def body(settings: BenchSettings, model: str, shape: Shape, *, token_ids: bool) -> dict[str, Any]:
    """The request of that shape. Prompts are random, so that no prefix cache answers for the model."""
    source = random.Random(shape.seed)
    request: dict[str, Any] = {
        "model": model,
        "max_tokens": shape.output_tokens,
        "temperature": settings.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.ignore_eos:
        request["ignore_eos"] = True
    if settings.endpoint == "completions" and token_ids:
        ids = [source.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(shape.prompt_tokens)]
        return {**request, "prompt": ids}
    words = " ".join(source.choice(_WORDS) for _ in range(shape.prompt_tokens))
    if settings.endpoint == "completions":
        return {**request, "prompt": words}
    return {**request, "messages": [{"role": "user", "content": words}]}
