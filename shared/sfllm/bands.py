"""Length bands: lengths that are about the same, as everybody counts them."""

from __future__ import annotations

from bisect import bisect_left

BAND_RATIO = 1.5
FIRST_BAND_TOKENS = 16

_BAND_ENDS = tuple(int(FIRST_BAND_TOKENS * BAND_RATIO**index) for index in range(40))


def band_of(tokens: int) -> int:
    """The length band of that many tokens: bands end at 16, 24, 36, 54, ... (a ratio of 1.5)."""
    return bisect_left(_BAND_ENDS, tokens)


def band_end(band: int) -> int:
    """The most tokens that belong to a band; the last band has no end and gives the start instead."""
    return _BAND_ENDS[min(band, len(_BAND_ENDS) - 1)]
