"""`python -m bench.scheduler_load`: one scheduler process under load, over real sockets.

Gateways and workers are sockets in this process with frames that lie ready; the scheduler has a core of its
own where there are two. Judged is the CPU time of its process, all threads together: that does not depend on
what else runs on the machine or on how fast this process is. Configurations take turns in every round, and
medians over the rounds are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .process import Scheduler, cores, running_scheduler
from .relay import measure_latency, measure_relay
from .requests import measure

TOKENS_TARGET = 1_000_000
REQUESTS_TARGET = 5_000
LATENCY_TARGET_MILLISECONDS = 2.0
ROWS = (32, 64)
QUEUES = (100, 1_000, 10_000, 100_000)
FLEETS = (1, 64, 1_000)
QUEUE_FLEET = 64
"""Workers where the length of the queue is varied; requests that wait where the fleet is."""

FLEET_QUEUE = 1_000

Values = dict[str, float]


class Case(NamedTuple):
    """One line of the table. `target` names a value, and what it has to be at least or at most."""

    name: str
    run: Callable[[Scheduler], Values]
    flags: tuple[str, ...] = ()
    target: str = ""


def main() -> int:
    """Measure and print."""
    options = _options()
    own, others = cores()
    os.sched_setaffinity(0, others)
    flags = [f"--policy={options.policy}", "--max-queue-requests=1000000"]
    cases = _cases(options)
    found: dict[str, list[Values]] = {case.name: [] for case in cases}
    for turn in range(options.rounds):
        for case in cases:
            with running_scheduler([*flags, *case.flags, *options.flag], own) as scheduler:
                values = case.run(scheduler)
            found[case.name].append(values)
            print(f"round {turn + 1}, {case.name}: {_words(values)}", file=sys.stderr, flush=True)
    medians = {name: _medians(rounds) for name, rounds in found.items()}
    for case in cases:
        print(f"{case.name:42} {_words(medians[case.name])}  {case.target}")
    if options.json is not None:
        options.json.write_text(json.dumps({"policy": options.policy, "results": medians}, indent=2) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scheduler_load", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured (3)")
    parser.add_argument("--policy", default="auto", help="the scheduler's policy (auto)")
    parser.add_argument("--requests", type=int, default=20_000, help="requests of each measurement (20000)")
    parser.add_argument("--messages", type=int, default=100_000, help="messages of tokens of each (100000)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long latency is measured (5)")
    parser.add_argument("--only", default="", help="only what has this in its name")
    parser.add_argument("--flag", action="append", default=[], help="a further flag of the scheduler")
    parser.add_argument("--json", type=Path, help="write the medians to this file")
    return parser.parse_args()


def _cases(options: argparse.Namespace) -> list[Case]:
    at_least = "at least {} a second of a core"
    cases = [
        Case(
            "requests",
            partial(_requests, waiting=512, workers=64, count=options.requests),
            target=at_least.format(REQUESTS_TARGET),
        ),
        *(
            Case(
                f"tokens, messages of {rows}",
                partial(_relay, rows=rows, messages=options.messages),
                target=at_least.format(TOKENS_TARGET),
            )
            for rows in ROWS
        ),
        *(
            Case(
                f"latency at half of {TOKENS_TARGET} tokens/s, of {rows}",
                partial(_latency, rows=rows, seconds=options.seconds),
                target=f"p99 below {LATENCY_TARGET_MILLISECONDS:g} ms",
            )
            for rows in ROWS
        ),
    ]
    for waiting in QUEUES:
        run = partial(_requests, waiting=waiting, workers=QUEUE_FLEET, count=options.requests)
        cases.append(Case(f"requests, {waiting} in the queue", run))
    for workers in FLEETS:
        run = partial(_requests, waiting=FLEET_QUEUE, workers=workers, count=options.requests)
        cases.append(Case(f"requests, {workers} workers", run))
    return [case for case in cases if options.only in case.name]


def _requests(scheduler: Scheduler, *, waiting: int, workers: int, count: int) -> Values:
    result = measure(scheduler, waiting=waiting, workers=workers, requests=count)
    return {
        "cpu_us_per_request": result.cpu_microseconds,
        "per_core_second": 1e6 / result.cpu_microseconds,
        "per_second": result.per_second,
    }


def _relay(scheduler: Scheduler, *, rows: int, messages: int) -> Values:
    result = measure_relay(scheduler, rows=rows, messages=messages)
    return {
        "cpu_us_per_message": result.cpu_microseconds,
        "tokens_per_core_second": 1e6 * rows / result.cpu_microseconds,
        "tokens_per_second": result.tokens_per_second,
    }


def _latency(scheduler: Scheduler, *, rows: int, seconds: float) -> Values:
    result = measure_latency(scheduler, rows=rows, tokens_per_second=TOKENS_TARGET / 2, seconds=seconds)
    return {
        "tokens_per_second": result.tokens_per_second,
        "p50_ms": result.p50_milliseconds,
        "p99_ms": result.p99_milliseconds,
    }


def _medians(rounds: Sequence[Values]) -> Values:
    return {name: statistics.median(values[name] for values in rounds) for name in rounds[0]}


def _words(values: Values) -> str:
    return ", ".join(
        f"{name} {value:,.0f}" if value >= 100 else f"{name} {value:.2f}" for name, value in values.items()
    )


if __name__ == "__main__":
    sys.exit(main())
