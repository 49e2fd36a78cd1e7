"""The requests of a benchmark: sizes, times and prompts from a seed, and the bodies that carry them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from sfllm_cli.bench.trace import Entry, poisson_times, rescaled
from sfllm_cli.bench_settings import BenchSettings

# Below are special tokens in most vocabularies, above there may be none in a small one.
TOKEN_IDS = range(100, 1000)

_WORDS = (
    *("river", "stone", "light", "garden", "winter", "letter", "music", "paper", "window", "mountain"),
    *("silver", "morning", "question", "answer", "bridge", "city", "forest", "number", "summer", "story"),
    *("island", "engine", "market", "season", "village", "ocean", "thunder", "harbour", "field", "table"),
)


class Span(NamedTuple):
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int


class Point(NamedTuple):
    """How hard to load: a closed loop of `concurrency`, or an open loop of `rate` requests a second.

    Neither means the times of a trace as they were recorded.
    """

    concurrency: int | None = None
    rate: float | None = None

    @property
    def label(self) -> str:
        """The point in words."""
        if self.concurrency is not None:
            return f"{self.concurrency} at once" if self.concurrency > 1 else "one at a time"
        if self.rate is None:
            return "as recorded"
        return "all at once" if self.rate == float("inf") else f"{self.rate:g} requests/s"


class Shape(NamedTuple):
    """One request: when it is due (seconds, in an open loop), its sizes in tokens, whose prefix it has."""

    at: float
    prompt_tokens: int
    output_tokens: int
    prefix: int


def parse_span(text: str) -> Span:
    """`128` or `16:512`. Raises ValueError when it is empty or starts below one."""
    low, _, high = text.partition(":")
    span = Span(int(low), int(high or low))
    if not 1 <= span.low <= span.high:
        raise ValueError(f"{text}: expected a number of tokens, or a range from low to high such as 16:512")
    return span


def points(settings: BenchSettings) -> list[Point]:
    """What to sweep over."""
    if settings.request_rate:
        return [Point(rate=rate) for rate in settings.request_rate]
    if settings.trace is not None:
        return [Point()]
    return [Point(concurrency=concurrency) for concurrency in settings.concurrency]


def shapes(settings: BenchSettings, point: Point, count: int, trace: Sequence[Entry] | None) -> list[Shape]:
    """The sizes and times of `count` requests, or as many as the trace has; the same for the same seed.

    Raises ValueError for a span that is none.
    """
    sizes, moments, choice = (
        random.Random(f"{settings.seed} {purpose}") for purpose in ("size", "time", "prefix")
    )
    if trace is None:
        prompts, outputs = parse_span(settings.prompt_tokens), parse_span(settings.output_tokens)
        entries = [Entry(0.0, sizes.randint(*prompts), sizes.randint(*outputs)) for _ in range(count)]
        times = poisson_times(point.rate, count, moments) if point.rate else [0.0] * count
    else:
        entries = list(trace[:count])
        times = [entry.at for entry in entries]
        if point.rate is not None:
            times = rescaled(times, point.rate)
    return [
        Shape(time, entry.prompt_tokens, entry.output_tokens, choice.randrange(settings.prefixes))
        for time, entry in zip(times, entries, strict=True)
    ]


def bodies(
    settings: BenchSettings, model: str, sizes: Sequence[Shape], *, token_ids: bool, salt: str
) -> list[bytes]:
    """The encoded requests of those shapes.

    Prompts are random, and others for another `salt`, so that no prefix cache answers for the
    model; only the prefixes are shared, by the requests of one salt.
    """
    prefixes = {
        index: _content(random.Random(f"{settings.seed} {salt} {index}"), settings.prefix_tokens, token_ids)
        for index in {shape.prefix for shape in sizes}
    }
    source = random.Random(f"{settings.seed} {salt}")
    common: dict[str, Any] = {
        "model": model,
        "temperature": settings.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if settings.ignore_eos else {}),
        **extra_body(settings.extra_body),
    }
    return [
        _body(
            settings,
            {**common, "max_tokens": shape.output_tokens},
            [*prefixes[shape.prefix], *_content(source, shape.prompt_tokens, token_ids)],
        )
        for shape in sizes
    ]


def extra_body(text: str) -> dict[str, Any]:
    """The fields that every request gets as well. Raises ValueError when the text is no JSON object."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--extra-body: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("--extra-body: expected a JSON object")
    return fields


def _content(source: random.Random, count: int, token_ids: bool) -> list[Any]:
    return source.choices(TOKEN_IDS if token_ids else _WORDS, k=count)


def _body(settings: BenchSettings, request: dict[str, Any], content: list[Any]) -> bytes:
    prompt = content if content and isinstance(content[0], int) else " ".join(content)
    if settings.endpoint == "completions":
        request["prompt"] = prompt
    else:
        request["messages"] = [{"role": "user", "content": prompt}]
    return json.dumps(request).encode()
