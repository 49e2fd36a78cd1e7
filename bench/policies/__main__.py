"""`python -m bench.policies` runs every policy on the same requests and writes tables.

The mixes: (a) a conversation trace (`--trace FILE` for Azure's of 2023; without it made-up lengths like
those), (b) 80% of 64 and 20% of 4,096 prompt tokens, (c) 100 to 1,024, (d) chats that share beginnings, (e)
all equal. For each mix and fleet the capacity is measured first; goodput counts requests whose first token
came within 2 s and whose later ones within 50 ms on average. The lines are written as they are found, to a
JSON file that `--tables FILE` makes Markdown of.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from bench.policies.tables import BASELINE, tables
from msgspec import to_builtins

from sfllm_cli.bench.trace import Entry, parse_trace
from sfllm_cli.simulate.command import capacity, fleet_profile, simulate
from sfllm_cli.simulate_settings import SimulateSettings

MixName = Literal["conversation", "two-sizes", "uniform", "chats", "equal"]
PolicyName = Literal["fcfs", "length", "prefix", "auto"]

REQUESTS = {1: 6_000, 8: 15_000, 64: 60_000, 1000: 300_000}
REQUESTS_A_WORKER = 300


class Case(NamedTuple):
    """A mix on a fleet."""

    mix: MixName
    workers: int


def main(argv: Sequence[str]) -> int:
    """Run what the arguments say."""
    arguments = _parser().parse_args(argv)
    if arguments.tables:
        print(tables(json.loads(Path(arguments.tables).read_text())))
        return 0
    if BASELINE not in arguments.policies:
        arguments.policies.insert(0, BASELINE)  # every figure is a multiple of its
    entries = parse_trace(arguments.trace.read_text(encoding="utf-8")) if arguments.trace else None
    lines: list[dict[str, Any]] = []
    for workers in arguments.workers:
        for mix in arguments.mixes:
            for line in _run(Case(mix, workers), arguments, entries if mix == "conversation" else None):
                lines.append(line)
                arguments.out.write_text(json.dumps(lines, indent=1) + "\n")
                _say(line)
    print(tables(lines))
    return 0


def _run(case: Case, arguments: argparse.Namespace, entries: Sequence[Entry] | None) -> Any:
    settings = SimulateSettings(
        profile=arguments.profile,
        workers=case.workers,
        mix=case.mix,
        requests=arguments.requests or REQUESTS.get(case.workers, REQUESTS_A_WORKER * case.workers),
        seed=arguments.seed,
    )
    profile = fleet_profile(settings)
    served = capacity(settings, profile, entries)
    for load in arguments.loads:
        for policy in arguments.policies:
            figures, cost = simulate(settings, profile, policy, served * load, entries)
            yield {
                **case._asdict(),
                "load": load,
                "policy": policy,
                "capacity": served,
                "requests": settings.requests,
                "core_microseconds": 1e6 * cost.core_seconds / settings.requests,
                "figures": to_builtins(figures),
            }


def _say(line: dict[str, Any]) -> None:
    figures = line["figures"]
    print(
        f"{line['mix']} on {line['workers']} at {line['load']}: {line['policy']} "
        f"{figures['good_per_second']:.1f} good/s of {line['capacity'] * line['load']:.1f}, "
        f"TTFT p99 {figures['ttft']['p99'] * 1000:.0f} ms",
        file=sys.stderr,
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.policies", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--mixes", nargs="+", choices=get_args(MixName), default=list(get_args(MixName)))
    parser.add_argument(
        "--policies", nargs="+", choices=get_args(PolicyName), default=["fcfs", "length", "auto"]
    )
    parser.add_argument("--loads", type=float, nargs="+", default=[0.8, 1.0, 1.1, 1.3])
    parser.add_argument("--requests", type=int, help="in every run, instead of a number that fits the fleet")
    parser.add_argument("--profile", default="gpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="CSV file for the first mix")
    parser.add_argument("--out", type=Path, default=Path("policies.json"))
    parser.add_argument("--tables", help="only write the tables of a file that was written before")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
