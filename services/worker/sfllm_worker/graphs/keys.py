"""Which decode graphs exist: one per batch bucket and context band. Pure.

A captured graph has its launch grids baked in. The bucket fixes the rows; the band, the longest context
that the grids cover, keeps a short batch from paying for the longest context that the model could have.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

SPLIT_TOKENS = 256
"""Tokens of one split of decode attention. Bands are multiples of it."""

SMALLEST_BAND = 2 * SPLIT_TOKENS
"""Below it there is next to nothing to save: splits past a context's end return at once."""

SMALL_BUCKETS = (1, 2, 4)
BUCKET_STEP = 8
"""Larger buckets are multiples of this, so that at most seven rows of a step are padding."""


class GraphKey(NamedTuple):
    """A graph of `batch` rows whose contexts have at most `context` tokens."""

    batch: int
    context: int


def batch_buckets(max_batch: int, largest: int | None = None, chosen: Sequence[int] = ()) -> tuple[int, ...]:
    """Batch sizes to capture, ascending: 1, 2, 4, 8, 16, 24, ... up to `max_batch`.

    `largest` bounds them further; `chosen` replaces them. A bucket above the largest step is of no use,
    so the largest one kept is the first that holds it. Raises ValueError for a size below 1, and when none
    is left.
    """
    if any(size < 1 for size in chosen) or (largest is not None and largest < 1):
        raise ValueError("batch sizes of CUDA graphs must be at least 1")
    bound = max_batch if largest is None else min(max_batch, largest)
    if chosen:
        sizes = sorted({size for size in chosen if largest is None or size <= largest})
        if not sizes:
            raise ValueError(f"none of the batch sizes chosen for CUDA graphs is at most {largest}")
        below = [size for size in sizes if size < bound]
        return (*below, *[size for size in sizes if size >= bound][:1])
    regular = (*SMALL_BUCKETS, *range(BUCKET_STEP, bound, BUCKET_STEP))
    return (*(size for size in regular if size < bound), bound)


def context_bands(max_model_len: int) -> tuple[int, ...]:
    """Context lengths to capture, ascending, each twice the one before; the last holds `max_model_len`."""
    longest = -(-max_model_len // SPLIT_TOKENS) * SPLIT_TOKENS
    bands = []
    band = SMALLEST_BAND
    while band < longest:
        bands.append(band)
        band *= 2
    return (*bands, longest)


class GraphPlan(NamedTuple):
    """All keys that are worth a graph, each list in the order in which it is to be captured."""

    first: tuple[GraphKey, ...]
    """Captured before the worker is ready: a coarse grid that holds every step the others hold."""
    later: tuple[GraphKey, ...]
    """Captured one at a time when there is nothing to do: they only save padding."""

    @property
    def keys(self) -> tuple[GraphKey, ...]:
        """All of them."""
        return self.first + self.later

    @property
    def largest(self) -> GraphKey:
        """The most rows and the longest context: it is the first, and needs the most memory."""
        return self.first[0]


def plan_graphs(buckets: Sequence[int], bands: Sequence[int]) -> GraphPlan:
    """The keys of ascending buckets and bands.

    The first set has the powers of two and the largest bucket, each with every band, largest first: what
    is captured later fits into memory that those have taken. Later ones go from short contexts to long.
    """
    coarse = {size for size in buckets if size & (size - 1) == 0} | {buckets[-1]}
    first = sorted(
        (GraphKey(batch, band) for batch in coarse for band in bands),
        key=lambda key: (key.batch * key.context, key),
        reverse=True,
    )
    largest = GraphKey(buckets[-1], bands[-1])
    first.remove(largest)
    later = [GraphKey(batch, band) for band in bands for batch in buckets if batch not in coarse]
    return GraphPlan((largest, *first), tuple(later))


class KeyIndex:
    """The captured keys, to find the one for a step in. Bounded by the plan's keys."""

    def __init__(self) -> None:
        self._buckets: list[int] = []
        self._bands: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._bands.values()))

    def add(self, key: GraphKey) -> None:
        """`key` can be used from now on."""
        if key.batch not in self._bands:
            bisect.insort(self._buckets, key.batch)
            self._bands[key.batch] = []
        bisect.insort(self._bands[key.batch], key.context)

    def find(self, batch: int, context: int) -> GraphKey | None:
        """The smallest bucket that holds `batch` rows, with its smallest band that holds `context` tokens.

        A bucket whose bands are all too short is passed over; None when nothing fits.
        """
        for bucket in self._buckets[bisect.bisect_left(self._buckets, batch) :]:
            bands = self._bands[bucket]
            position = bisect.bisect_left(bands, context)
            if position < len(bands):
                return GraphKey(bucket, bands[position])
        return None
