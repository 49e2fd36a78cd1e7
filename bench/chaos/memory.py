"""How much memory each service takes over time, and how much of it grew."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import psutil

from chaos.service import Service

MIB = 2**20
SETTLE_SECONDS = 600.0
SETTLE_SHARE = 1 / 6
"""Caches, pools and arenas fill at first: a run's first ten minutes, or its first sixth, do not count."""


class Sample(NamedTuple):
    """Resident bytes of a service and its own children, so many seconds after the start."""

    seconds: float
    resident_bytes: int


class Growth(NamedTuple):
    """In MiB: what a service took when it had settled, the most it took afterwards, and the difference."""

    settled: float
    most: float
    grown: float


def growth(samples: Sequence[Sample]) -> Growth:
    """The growth after the settling time of a run that ended with the last sample."""
    settled_at = min(SETTLE_SECONDS, samples[-1].seconds * SETTLE_SHARE)
    counted = [sample.resident_bytes / MIB for sample in samples if sample.seconds >= settled_at]
    return Growth(round(counted[0], 1), round(max(counted), 1), round(max(counted) - counted[0], 1))


class MemoryWatch:
    """Samples all services every `interval` seconds while `run` runs."""

    def __init__(self, services: Sequence[Service], interval: float) -> None:
        self._services = services
        self._interval = interval
        self.samples: dict[str, list[Sample]] = defaultdict(list)

    async def run(self) -> None:
        """Sample until cancelled."""
        started = time.monotonic()
        while True:
            self.take(time.monotonic() - started)
            await asyncio.sleep(self._interval)

    def take(self, seconds: float) -> None:
        """One sample of each service."""
        for service in self._services:
            if service.pid is not None:
                self.samples[service.name].append(Sample(seconds, _resident(service.pid)))

    def growths(self) -> dict[str, Growth]:
        """The growth of each service."""
        return {name: growth(samples) for name, samples in self.samples.items()}


def _resident(pid: int) -> int:
    process = psutil.Process(pid)
    return sum(int(each.memory_info().rss) for each in (process, *process.children(recursive=True)))
