"""The figures of a benchmark: from the times at which tokens came to statistics. No clocks, no sockets.

- TTFT: from sending the request to its first output token.
- ITL: between one arrival of output and the next, of the same answer.
- TPOT: time for the tokens after the first, each: (end - first) / (tokens - 1).
- End-to-end: from sending the request to the end of the answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

PERCENTILES = (50, 95, 99)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answered or failed request. Times are in seconds of one clock.

    `arrivals` are the times at which output came. `error` is empty for a complete answer.
    """

    sent_at: float
    ended_at: float
    arrivals: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean and percentiles of a set of values; NaN when it is empty."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """The summary of `values`, in any order."""
        if not values:
            return cls(math.nan, math.nan, math.nan, math.nan)
        ordered = sorted(values)
        return cls(math.fsum(ordered) / len(ordered), *(percentile(ordered, rank) for rank in PERCENTILES))

    def to_json(self) -> dict[str, float | None]:
        """A plain dictionary, with null where there is no value."""
        values = dataclasses.asdict(self).items()
        return {name: None if math.isnan(value) else value for name, value in values}


def percentile(ordered: Sequence[float], rank: float) -> float:
    """The `rank`-th percentile of ascending values, interpolated linearly between neighbours."""
    position = (len(ordered) - 1) * rank / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `sfllm bench` prints. Latencies in seconds; throughput over complete answers only."""

    completed: int
    failed: int
    errors: dict[str, int]
    seconds: float
    prompt_tokens: int
    output_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    ttft: Summary
    itl: Summary
    tpot: Summary
    end_to_end: Summary

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, with null where there is no value."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: value.to_json() if isinstance(value, Summary) else value for name, value in values.items()
        }


def report(samples: Sequence[Sample]) -> Report:
    """The figures of all requests. The time span is from the first sending to the last end."""
    good = [sample for sample in samples if not sample.error]
    first = min((sample.sent_at for sample in samples), default=0.0)
    seconds = max((sample.ended_at for sample in samples), default=0.0) - first
    prompt_tokens = sum(sample.prompt_tokens for sample in good)
    output_tokens = sum(sample.output_tokens for sample in good)
    answered = [sample for sample in good if sample.arrivals]
    return Report(
        completed=len(good),
        failed=len(samples) - len(good),
        errors=dict(Counter(sample.error for sample in samples if sample.error).most_common(10)),
        seconds=seconds,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        requests_per_second=_rate(len(good), seconds),
        output_tokens_per_second=_rate(output_tokens, seconds),
        total_tokens_per_second=_rate(prompt_tokens + output_tokens, seconds),
        ttft=Summary.of([sample.arrivals[0] - sample.sent_at for sample in answered]),
        itl=Summary.of(
            [
                later - earlier
                for sample in answered
                for earlier, later in zip(sample.arrivals, sample.arrivals[1:], strict=False)
            ]
        ),
        tpot=Summary.of(
            [
                (sample.arrivals[-1] - sample.arrivals[0]) / (sample.output_tokens - 1)
                for sample in answered
                if sample.output_tokens > 1
            ]
        ),
        end_to_end=Summary.of([sample.ended_at - sample.sent_at for sample in good]),
    )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
