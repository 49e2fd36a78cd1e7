"""Requests by length band, the oldest of each band first.

Any request can leave at any time (a cancel, a deadline) and a retried one comes back in its old place, so
every band is a sorted list of chunks (`sortedcontainers`): adding, removing and finding the first are
logarithmic, and nothing stale is left behind. There are at most some forty bands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import merge
from operator import attrgetter

from sortedcontainers import SortedKeyList

from sfllm_scheduler.core.requests import Rank, Request

_rank = attrgetter("rank")


class Banded:
    """Requests in bands; `band_of` tells a request's band, which must not change while it is here."""

    def __init__(self, band_of: Callable[[Request], int]) -> None:
        self._band_of = band_of
        self._lists: dict[int, SortedKeyList[Request, Rank]] = {}

    def add(self, request: Request) -> None:
        """Put a request in its place."""
        band = self._band_of(request)
        members = self._lists.get(band)
        if members is None:
            members = self._lists[band] = SortedKeyList(key=_rank)
        members.add(request)

    def remove(self, request: Request) -> None:
        """Take a request out. Raises ValueError when it is not here."""
        self._lists[self._band_of(request)].remove(request)

    def first(self, band: int) -> Request | None:
        """The oldest of a band."""
        members = self._lists.get(band)
        return members[0] if members else None

    def heads(self) -> list[Request]:
        """The oldest request of each band."""
        return [members[0] for members in self._lists.values() if members]

    def bands(self) -> list[int]:
        """The bands in which there are requests."""
        return [band for band, members in self._lists.items() if members]

    def members(self, band: int) -> Iterator[Request]:
        """The requests of a band, oldest first."""
        return iter(self._lists.get(band, ()))

    def by_age(self, highest_band: int | None = None) -> Iterator[Request]:
        """The requests of all bands, or of those up to one, oldest first, found as they are asked for."""
        lists = self._lists.items()
        chosen = [members for band, members in lists if highest_band is None or band <= highest_band]
        return iter(chosen[0]) if len(chosen) == 1 else merge(*chosen, key=_rank)
