"""The figures of a benchmark: from the times at which tokens came to statistics. No clocks, no sockets.

- TTFT: from sending the request to its first output.
- ITL: between one arrival of output and the next, of the same answer.
- TPOT: time for the tokens after the first, each: (last arrival - first) / (tokens - 1).
- End-to-end: from sending the request to the end of the answer.
- Goodput: answers a second that kept the targets for TTFT and for the mean of their ITL.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

PERCENTILES = (50, 95, 99)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answered or failed request. Times are in seconds of one clock.

    `arrivals` are the times at which output came. `output_tokens` come from the server's usage if
    `has_usage`, and are the number of arrivals otherwise. `error` is empty for a complete answer.
    """

    sent_at: float
    ended_at: float
    arrivals: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    has_usage: bool = True
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first output; infinite when there was none."""
        return self.arrivals[0] - self.sent_at if self.arrivals else math.inf

    @property
    def mean_itl(self) -> float:
        """Mean seconds between arrivals; 0 when there was only one."""
        gaps = len(self.arrivals) - 1
        return (self.arrivals[-1] - self.arrivals[0]) / gaps if gaps > 0 else 0.0


class Targets(NamedTuple):
    """What an answer must keep to count as good, in seconds."""

    ttft: float = math.inf
    itl: float = math.inf

    def met_by(self, sample: Sample) -> bool:
        """Whether the answer is complete and was fast enough."""
        return not sample.error and sample.ttft <= self.ttft and sample.mean_itl <= self.itl


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
class Figures:
    """One round of load. Latencies in seconds; throughput over complete answers only.

    `tokens_counted_by` is `usage` (the server's own count), `chunks` (one token for each piece
    of a stream, which is too few when pieces hold several) or `both` (some answers each).
    """

    completed: float
    failed: float
    errors: dict[str, int]
    seconds: float
    prompt_tokens: float
    output_tokens: float
    tokens_counted_by: str
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    good_requests_per_second: float
    good_share: float
    ttft: Summary
    itl: Summary
    tpot: Summary
    end_to_end: Summary

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, with null where there is no value."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: value.to_json() if isinstance(value, Summary) else value for name, value in plain.items()
        }


def figures(samples: Sequence[Sample], targets: Targets = Targets()) -> Figures:  # noqa: B008 # immutable
    """The figures of a round. Its time runs from the first request sent to the last one's end."""
    good = [sample for sample in samples if not sample.error]
    seconds = max(s.ended_at for s in samples) - min(s.sent_at for s in samples) if samples else 0.0
    prompt_tokens = sum(sample.prompt_tokens for sample in good)
    output_tokens = sum(sample.output_tokens for sample in good)
    answered = [sample for sample in good if sample.arrivals]
    in_target = sum(map(targets.met_by, samples))
    return Figures(
        completed=len(good),
        failed=len(samples) - len(good),
        errors=dict(Counter(sample.error for sample in samples if sample.error).most_common(10)),
        seconds=seconds,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        tokens_counted_by=_counted_by({sample.has_usage for sample in good}),
        requests_per_second=_rate(len(good), seconds),
        output_tokens_per_second=_rate(output_tokens, seconds),
        total_tokens_per_second=_rate(prompt_tokens + output_tokens, seconds),
        good_requests_per_second=_rate(in_target, seconds),
        good_share=in_target / len(samples) if samples else 0.0,
        ttft=Summary.of([sample.ttft for sample in answered]),
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


def median_figures(rounds: Sequence[Figures]) -> Figures:
    """The median of each figure over rounds, of which there is at least one; errors are added up."""
    errors: Counter[str] = Counter()
    for each in rounds:
        errors.update(each.errors)
    values: dict[str, Any] = {
        "errors": dict(errors.most_common(10)),
        "tokens_counted_by": _same_or_both(each.tokens_counted_by for each in rounds),
    }
    for field in dataclasses.fields(Figures):
        column = [getattr(each, field.name) for each in rounds]
        if isinstance(column[0], Summary):
            values[field.name] = _median_summary(column)
        elif field.name not in values:
            values[field.name] = statistics.median(column)
    return Figures(**values)


def _median_summary(summaries: Sequence[Summary]) -> Summary:
    def middle(name: str) -> float:
        known = [value for each in summaries if not math.isnan(value := getattr(each, name))]
        return statistics.median(known) if known else math.nan

    return Summary(*(middle(field.name) for field in dataclasses.fields(Summary)))


def _counted_by(has_usage: set[bool]) -> str:
    return _same_or_both("usage" if known else "chunks" for known in has_usage)


def _same_or_both(ways: Iterable[str]) -> str:
    distinct = set(ways)
    return distinct.pop() if len(distinct) == 1 else ("both" if distinct else "usage")


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
