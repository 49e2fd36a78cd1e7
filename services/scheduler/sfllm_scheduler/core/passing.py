"""Who may pass whom while a cohort takes members of a line out of order."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator

from sfllm.bands import band_of
from sfllm_scheduler.core.lines import Line
from sfllm_scheduler.core.requests import Rank, Request
from sfllm_scheduler.core.workers import Worker


class Passing:
    """Counts the overtakers that a cohort adds to those of a line. Only who could run here is passed here."""

    def __init__(self, line: Line, worker: Worker, max_overtakes: int) -> None:
        self._line = line
        self._worker = worker
        self._max_overtakes = max_overtakes
        self._ranks: list[Rank] = []
        self._chosen: set[Request] = set()
        self._by_age: Iterator[Request] | None = None
        self._oldest: Request | None = None

    def next(self, wanted: Request) -> Request:
        """`wanted`, or the oldest request that could run here when that may not be passed again."""
        if len(self._line.overtakers) + len(self._ranks) < self._max_overtakes:
            return wanted
        oldest = self._find_oldest()
        if oldest is None or oldest is wanted or not self._worker.can_ever_run(wanted):
            return wanted
        younger = len(self._ranks) - bisect_right(self._ranks, oldest.rank)
        passed = self._line.overtaking(oldest.rank) + younger
        return wanted if passed < self._max_overtakes else oldest

    def choose(self, request: Request) -> None:
        """`request` joins the cohort."""
        self._chosen.add(request)
        insort(self._ranks, request.rank)

    def _find_oldest(self) -> Request | None:
        """The oldest that is not chosen yet; bands that are too large for the worker are left out."""
        first = self._line.oldest
        if first not in self._chosen and self._worker.can_ever_run(first):
            return first
        if self._by_age is None:
            largest = min(self._worker.capacity.kv_tokens, self._worker.card.max_model_len)
            self._by_age = self._line.by_size.by_age(band_of(largest))
            self._oldest = next(self._by_age, None)
        while self._oldest is not None and (
            self._oldest in self._chosen or not self._worker.can_ever_run(self._oldest)
        ):
            self._oldest = next(self._by_age, None)
        return self._oldest
