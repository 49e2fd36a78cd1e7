"""Requests by length band, the oldest of each band first. There are at most some forty bands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import merge
from operator import attrgetter

from sfllm_scheduler.core.by_age import ByAge
from sfllm_scheduler.core.requests import Request

_rank = attrgetter("rank")


class Banded:
    """Requests in bands; `band_of` tells a request's band, which must not change while it is here."""

    __slots__ = ("_band_of", "_lists")

    def __init__(self, band_of: Callable[[Request], int]) -> None:
        self._band_of = band_of
        self._lists: dict[int, ByAge] = {}

    def add(self, request: Request) -> None:
        """Put a request in its place."""
        band = self._band_of(request)
        members = self._lists.get(band)
        if members is None:
            members = self._lists[band] = ByAge()
        members.add(request)

    def remove(self, request: Request) -> None:
        """Take a request out. Raises KeyError or ValueError when it is not here."""
        band = self._band_of(request)
        members = self._lists[band]
        members.remove(request)
        if not members:
            del self._lists[band]

    def first(self, band: int) -> Request | None:
        """The oldest of a band."""
        members = self._lists.get(band)
        return None if members is None else members.first

    def heads(self) -> list[Request]:
        """The oldest request of each band."""
        return [members.first for members in self._lists.values()]

    def bands(self) -> list[int]:
        """The bands in which there are requests."""
        return list(self._lists)

    def members(self, band: int) -> Iterator[Request]:
        """The requests of a band, oldest first."""
        return iter(self._lists.get(band, ()))

    def by_age(self, highest_band: int | None = None) -> Iterator[Request]:
        """The requests of all bands, or of those up to one, oldest first, found as they are asked for."""
        lists = self._lists.items()
        chosen = [members for band, members in lists if highest_band is None or band <= highest_band]
        return iter(chosen[0]) if len(chosen) == 1 else merge(*chosen, key=_rank)
