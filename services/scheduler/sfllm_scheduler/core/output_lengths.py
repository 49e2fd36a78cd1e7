"""How long outputs will be, learned from those that ended: what a request is expected to need of the cache.

Each model keeps a histogram of output lengths for every pair of prompt band and size of `max_tokens`, and
coarser ones for when a pair has been seen too seldom. Old observations count less and less. Nothing is
random: the same ends in the same order give the same estimates.

**How much cache to set aside.** Too much, and sequences that would fit wait; too little, and a worker
preempts a sequence and computes it again. The reserve is the larger of two:

- what a running sequence has generated on average at a random moment, E[L^2] / 2 E[L]. (Renewal theory: long
  outputs run longer, so they are met more often, and are half done on average.) Summed over a full worker
  this is what its cache will hold, whatever the distribution: with one output in ten of 4,000 tokens and the
  others of 10, the mean is 409 but a running sequence has 1,950 on average.
- the 0.75 quantile, since cohorts start together: requests of like age are not spread over their lives as
  the first rule assumes. Three of four members never outgrow it, and the others do when most have ended.
"""

from __future__ import annotations

from math import ceil, exp2, log2

from sfllm_scheduler.core.requests import UNKNOWN_OUTPUT, OutputLength

QUANTILE = 0.75
LEAST_OBSERVATIONS = 16
"""Fewer say too little; a coarser histogram is asked instead."""

FORGET_OBSERVATIONS = 512
"""When a histogram has so many, all of them count half."""

BINS_PER_DOUBLING = 4
_ANY = -1


class OutputLengths:
    """Estimates for one model. Bounded: some forty prompt bands times some twenty sizes of `max_tokens`."""

    def __init__(self) -> None:
        self._histograms: dict[tuple[int, int], _Histogram] = {}

    def expect(self, prompt_band: int, max_tokens: int) -> OutputLength:
        """What to expect of a choice of such a request; of a kind that was never seen, a fixed guess."""
        for kind in _kinds(prompt_band, max_tokens):
            histogram = self._histograms.get(kind)
            if histogram is not None and histogram.count >= LEAST_OBSERVATIONS:
                mean, reserve = histogram.estimate()
                return OutputLength(min(mean, max_tokens), min(reserve, max_tokens))
        return OutputLength(min(UNKNOWN_OUTPUT.mean, max_tokens), min(UNKNOWN_OUTPUT.reserve, max_tokens))

    def learn(self, prompt_band: int, max_tokens: int, generated: int) -> None:
        """A choice of such a request has ended by itself or by its limit, after so many tokens."""
        generated = min(max(generated, 1), max_tokens)
        index = int(BINS_PER_DOUBLING * log2(generated))
        for kind in _kinds(prompt_band, max_tokens):
            histogram = self._histograms.get(kind)
            if histogram is None:
                histogram = self._histograms[kind] = _Histogram()
            histogram.add(generated, index)


def _kinds(prompt_band: int, max_tokens: int) -> tuple[tuple[int, int], ...]:
    """From the finest to the coarsest. Limits are told apart by powers of 4: users copy round numbers."""
    limit = max_tokens.bit_length() // 2
    return (prompt_band, limit), (_ANY, limit), (_ANY, _ANY)


class _Histogram:
    """Counts of lengths in bins whose ends grow by a fourth root of 2, and the exact sums beside them."""

    def __init__(self) -> None:
        self.count = 0.0
        self._sum = 0.0
        self._squares = 0.0
        self._bins: list[float] = []
        self._estimate: tuple[float, int] | None = None

    def add(self, tokens: int, index: int) -> None:
        """Count a length of at least 1; `index` is its bin."""
        bins = self._bins
        if index >= len(bins):
            bins += [0.0] * (index + 1 - len(bins))
        bins[index] += 1.0
        self.count += 1.0
        self._sum += tokens
        self._squares += tokens * tokens
        self._estimate = None
        if self.count >= FORGET_OBSERVATIONS:
            self._bins = [count / 2 for count in self._bins]
            self.count /= 2
            self._sum /= 2
            self._squares /= 2

    def estimate(self) -> tuple[float, int]:
        """Mean length, and what to reserve."""
        if self._estimate is None:
            half_done = self._squares / (2 * self._sum)
            self._estimate = self._sum / self.count, ceil(max(half_done, self._quantile()))
        return self._estimate

    def _quantile(self) -> int:
        """The most tokens of the bin that the quantile is in."""
        below = 0.0
        for index, count in enumerate(self._bins):
            below += count
            if below >= QUANTILE * self.count:
                return _most_tokens(index)
        return _most_tokens(len(self._bins) - 1)


def _most_tokens(index: int) -> int:
    return max(1, ceil(exp2((index + 1) / BINS_PER_DOUBLING)) - 1)
