"""How a failure is told: as the shortest script that shows it."""

from __future__ import annotations

import logging

import structlog

from sfllm_gateway.streams import StreamTable

from .gateway import MakeTable
from .run import Failure, run
from .script import Script
from .shrink import shrink


def quiet_logs() -> None:
    """The machines log what they do; a simulation would print millions of lines."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def shortest(script: Script, kind: str, make_table: MakeTable = StreamTable) -> Script:
    """A shorter script that breaks the same invariant."""

    def fails(candidate: Script) -> bool:
        failure = run(candidate, make_table).failure
        return failure is not None and failure.kind == kind

    return shrink(script, fails)


def failing(
    script: Script, failure: Failure, shrunk: bool = True, make_table: MakeTable = StreamTable
) -> str:
    """What went wrong, with the script to run again (`python -m sfllm_simulation FILE`)."""
    if shrunk:
        script = shortest(script, failure.kind, make_table)
        failure = run(script, make_table).failure or failure
    return f"{failure.text} (at t={failure.time:.3f})\n{script}\n{failure.trace}"
