"""How long a server takes to start: from its command to when it is ready, and to its first token."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from bench.peers.contenders import Contender
from bench.peers.processes import Running, running

SLOW_START_SECONDS = 45.0
"""A server that takes longer is started once only."""


class Start(NamedTuple):
    """The first start of a run, medians of the ones after it, and memory after the last workload.

    Times are in seconds; those of warm starts are None where there was none.
    """

    server: str
    first_ready: float
    first_token: float
    warm_starts: int
    warm_ready: float | None
    warm_token: float | None
    memory_bytes: int


def start_of(starts: Sequence[Running], memory_bytes: int) -> Start:
    """The figures of the starts of one server, in their order."""
    first, *warm = starts

    def middle(values: list[float]) -> float | None:
        return statistics.median(values) if values else None

    return Start(
        first.contender.name,
        first.ready_seconds,
        first.start_seconds,
        len(warm),
        middle([each.ready_seconds for each in warm]),
        middle([each.start_seconds for each in warm]),
        memory_bytes,
    )


def started(contender: Contender, logs: Path, times: int, stack: ExitStack) -> list[Running]:
    """Start it so many times after each other; the last one runs until `stack` ends. Raises `StartError`."""
    print(f"starting {contender.name}", file=sys.stderr, flush=True)
    found: list[Running] = []
    while True:
        with ExitStack() as attempt:
            server = attempt.enter_context(running(contender, logs))
            found.append(server)
            if len(found) > times or server.start_seconds > SLOW_START_SECONDS:
                stack.enter_context(attempt.pop_all())
                return found
