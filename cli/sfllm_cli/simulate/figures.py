"""What came of a simulation: throughput, goodput, latencies, fairness, and what the scheduler did for it."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from sfllm_cli.bench.figures import percentile
from sfllm_cli.simulate.fairness import fairness
from sfllm_cli.simulate.gateways import Ask
from sfllm_cli.simulate.workload import Asked

GAP_RESOLUTION = 1.02
"""Times between tokens are counted in classes whose ends differ by so much."""

OUTPUT_WEIGHT = 2.0
"""Of an output token, in what a tenant was served; a prompt token counts 1."""

_LOG_RESOLUTION = math.log(GAP_RESOLUTION)


class Percentiles(msgspec.Struct, frozen=True):
    """In seconds; NaN is left out by writing nothing."""

    p50: float
    p95: float
    p99: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of requests that were asked for. Rates are over the time from the first one to the last one's end.

    But for two, so that the first and last ones, which run alone, do not dilute them: `good_per_second` is
    over the time in which requests came, `steady_per_second` over that in which the middle half ended.

    `good` requests had their first token and, on average, each later one within the targets.
    `fairness` is Jain's index of the parts of their fair shares that tenants were served while requests
    came (`fairness.py`). `overtakes_most` is how many requests of the same tenant that came later were
    granted before one. `length_spread` is the longest prompt of a cohort over its shortest, on average,
    `prefix_hit_share` the part of the tokens to prefill that workers had in their caches.
    """

    requests: int
    finished: int
    errors: dict[str, int]
    seconds: float
    requests_per_second: float
    steady_per_second: float
    output_tokens_per_second: float
    good: int
    good_per_second: float
    good_share: float
    ttft: Percentiles
    itl: Percentiles
    end_to_end: Percentiles
    length_spread: float
    prefix_hit_share: float
    preemptions: int
    attempts_lost: int
    fairness: float
    overtakes_most: int


class WorkerCounts(NamedTuple):
    """Of all workers: preempted sequences, tokens to prefill, and how many of these were in their caches."""

    preemptions: int
    queried_tokens: int
    hit_tokens: int


class Collector:
    """Takes in requests as they end, steps and records, in memory that hardly grows."""

    def __init__(self, ttft_target: float, itl_target: float) -> None:
        self._ttft_target = ttft_target
        self._itl_target = itl_target
        self._ttft, self._end_to_end, self._ends = array("d"), array("d"), array("d")
        self._last_asked = 0.0
        self._gaps: defaultdict[int, int] = defaultdict(int)
        self._errors: defaultdict[str, int] = defaultdict(int)
        self._asked: defaultdict[str, float] = defaultdict(float)
        self._served: defaultdict[str, float] = defaultdict(float)
        self._all_came = False
        self._good = self._output_tokens = 0
        self._began, self._ended = math.inf, 0.0
        self._spread_sum = self._cohorts = 0.0

    @property
    def count(self) -> int:
        """Requests that have ended."""
        return len(self._end_to_end) + sum(self._errors.values())

    def came(self, asked: Asked) -> None:
        """A request is asked for."""
        self._began = min(self._began, asked.at)
        self._last_asked = max(self._last_asked, asked.at)
        self._asked[asked.tenant] += _service(asked)

    def all_came(self) -> None:
        """There will be no more: what ends from now on ends because nobody competes for the workers."""
        self._all_came = True

    def end(self, ask: Ask) -> None:
        """A request has ended."""
        asked = ask.asked
        self._ended = max(self._ended, ask.ended)
        if ask.error:
            self._errors[ask.error] += 1
            return
        ttft = ask.first - asked.at
        self._ttft.append(ttft)
        self._end_to_end.append(ask.ended - asked.at)
        self._ends.append(ask.ended)
        self._output_tokens += asked.output_tokens
        if not self._all_came:
            self._served[asked.tenant] += _service(asked)
        itl = (ask.ended - ask.first) / max(1, asked.output_tokens - 1)
        self._good += ttft <= self._ttft_target and itl <= self._itl_target

    def step(self, rows: int, seconds: float, steps: int) -> None:
        """So many equal steps gave tokens to so many sequences."""
        self._gaps[round(math.log(max(seconds, 1e-9)) / _LOG_RESOLUTION)] += rows * steps

    def cohort(self, spread: float) -> None:
        """A cohort was granted."""
        self._spread_sum += spread
        self._cohorts += 1

    def figures(self, workers: WorkerCounts, attempts_lost: int, overtakes_most: int) -> Figures:
        """Everything so far."""
        finished = len(self._end_to_end)
        seconds = max(self._ended - self._began, 1e-9) if self.count else 0.0
        until = self._last_asked if self._last_asked > self._began else self._ended
        window = max(until - self._began, 1e-9) if self.count else 1.0
        return Figures(
            requests=self.count,
            finished=finished,
            errors=dict(sorted(self._errors.items())),
            seconds=seconds,
            requests_per_second=finished / seconds if seconds else 0.0,
            steady_per_second=_middle_rate(self._ends, self._began),
            output_tokens_per_second=self._output_tokens / seconds if seconds else 0.0,
            good=self._good,
            good_per_second=self._good / window,
            good_share=self._good / self.count if self.count else 0.0,
            ttft=_percentiles(self._ttft),
            itl=self._gap_percentiles(),
            end_to_end=_percentiles(self._end_to_end),
            length_spread=self._spread_sum / self._cohorts if self._cohorts else 0.0,
            prefix_hit_share=workers.hit_tokens / workers.queried_tokens if workers.queried_tokens else 0.0,
            preemptions=workers.preemptions,
            attempts_lost=attempts_lost,
            fairness=fairness(self._asked, self._served),
            overtakes_most=overtakes_most,
        )

    def _gap_percentiles(self) -> Percentiles:
        total = sum(self._gaps.values())
        values, seen = [], 0
        ranks = [0.5, 0.95, 0.99]
        for place in sorted(self._gaps):
            seen += self._gaps[place]
            while ranks and seen >= ranks[0] * total:
                values.append(math.exp(place * _LOG_RESOLUTION))
                ranks.pop(0)
        return Percentiles(*values) if values else Percentiles(0.0, 0.0, 0.0)


def _service(asked: Asked) -> float:
    return asked.prompt_tokens + OUTPUT_WEIGHT * asked.output_tokens


def _middle_rate(ends: Sequence[float], began: float) -> float:
    """How many a second ended between the first quarter and the last.

    Where that is one moment, as when all are served together, how many ended a second in all the time.
    """
    if not ends:
        return 0.0
    ordered = sorted(ends)
    first, last = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    if last > first:
        return (bisect_right(ordered, last) - bisect_right(ordered, first)) / (last - first)
    return len(ordered) / max(ordered[-1] - began, 1e-9)


def _percentiles(values: Sequence[float]) -> Percentiles:
    if not values:
        return Percentiles(0.0, 0.0, 0.0)
    ordered = sorted(values)
    return Percentiles(*(percentile(ordered, rank) for rank in (50, 95, 99)))
