"""Sets up the peers, runs one load against each of them and against sfllm in rounds, writes the results.

`make bench-peers`, or `python -m bench.peers --peers vllm llama.cpp --quick`. The last line printed is the
ratios. A full run takes one to two hours, most of it waiting for the slowest peers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from bench.peers.contenders import OURS, PEERS, Contender, Setup, ours
from bench.peers.install import Installer, InstallError
from bench.peers.machine import measured
from bench.peers.models import Models
from bench.peers.processes import Running, StartError, running
from bench.peers.results import Row, Start, draw, ratios, row, table
from bench.peers.roofline import Machine, ModelSize, Size, floor_seconds
from bench.peers.workloads import Workload, closed_workloads, paced_workload
from rich.console import Console

from sfllm.model_files import cache_directory
from sfllm_cli.bench.command import Target, benchmark, read_trace
from sfllm_cli.bench.documents import shown_settings
from sfllm_cli.bench.rounds import Leg, results
from sfllm_cli.bench.workload import points, shapes
from sfllm_cli.bench_settings import BenchSettings
from sfllm_cli.errors import CommandError
from sfllm_cli.settings import ClientSettings


def main() -> int:
    """Run the comparison; 1 when a request failed."""
    arguments = _arguments()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    cache: Path = arguments.cache
    setup = Setup(
        Installer(cache),
        Models.prepare(cache),
        os.cpu_count() or 1,
        arguments.sfllm_args.split(),
        arguments.preload,
    )
    contenders = [ours(setup), *(PEERS[name](setup) for name in arguments.peers)]
    if arguments.install_only:
        print("\n".join(" ".join(contender.command) for contender in contenders))
        return 0
    logs = cache / "logs"
    logs.mkdir(exist_ok=True)
    comparison = Comparison(arguments, setup, measured())
    with contextlib.ExitStack() as stack:
        for contender in contenders:
            print(f"starting {contender.name}", file=sys.stderr, flush=True)
            comparison.add(stack.enter_context(running(contender, logs)))
        comparison.run()
        starts = comparison.starts()
    comparison.write(out, starts)
    return 1 if any(each.failed for each in comparison.rows) else 0


class Comparison:
    """The servers that run, and what was measured of them so far."""

    def __init__(self, arguments: argparse.Namespace, setup: Setup, machine: Machine) -> None:
        self.rows: list[Row] = []
        self._arguments = arguments
        self._model = ModelSize.read(setup.models.directory)
        self._machine = machine
        self._cores = setup.cores
        self._running: list[Running] = []
        self._legs: list[tuple[str, Leg]] = []
        self._settings: dict[str, BenchSettings] = {}

    def add(self, server: Running) -> None:
        """Take part with that server."""
        self._running.append(server)

    def run(self) -> None:
        """All workloads, W4's latencies last, as they need the capacity."""
        chosen = self._arguments.workloads
        for workload in closed_workloads(self._arguments.quick):
            if workload.group in chosen:
                self._measure(workload)
        saturated = [each for each in self.rows if each.workload == "W4 saturated"]
        peers = [each for each in saturated if not each.is_ours] or saturated
        if peers:
            capacity = max(each.requests_per_second for each in peers)
            self._measure(paced_workload(self._arguments.quick, capacity))

    def starts(self) -> list[Start]:
        """How each server came up, and its memory now."""
        return [Start(each.contender.name, each.start_seconds, each.memory_bytes()) for each in self._running]

    def write(self, out: Path, starts: Sequence[Start]) -> None:
        """The files, then the table, and the ratios as the last line."""
        text = table(self.rows, starts)
        document = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "quick": self._arguments.quick,
            "machine": {**self._machine._asdict(), "cores": self._cores},
            "commands": {each.contender.name: list(each.contender.command) for each in self._running},
            "settings": {name: shown_settings(settings) for name, settings in self._settings.items()},
            "starts": [start._asdict() for start in starts],
            "rows": [each.to_json() for each in self.rows],
            "rounds": [
                {"workload": name, "server": leg.server, "round": leg.round, "attempt": leg.attempt}
                | {"kept": leg.kept, "disturbed": leg.disturbed, "other_cores": leg.cpu.others}
                | leg.figures.to_json()
                for name, leg in self._legs
            ],
        }
        (out / "peers.json").write_text(json.dumps(document, indent=1) + "\n")
        (out / "peers.md").write_text(f"{text}\n\n{ratios(self.rows)}\n")
        (out / "peers.png").write_bytes(draw(self.rows, self._legs))
        print(f"{text}\n\nwritten to {out}: peers.md, peers.json, peers.png\n{ratios(self.rows)}")

    def _measure(self, workload: Workload) -> None:
        settings = msgspec.structs.replace(
            workload.settings,
            rounds=self._arguments.rounds,
            max_disturbance=self._arguments.max_disturbance,
            quiet_seconds=self._arguments.quiet_seconds,
        )
        self._settings[workload.name] = settings
        taking = [each for each in self._running if workload.group in each.contender.workloads]
        print(f"{workload.name}: {workload.title}", file=sys.stderr, flush=True)
        targets = {each.contender.name: _target(each, settings) for each in taking}
        trace = read_trace(settings)
        _, legs = asyncio.run(benchmark(settings, targets, trace, Console(stderr=True)))
        self._legs += [(workload.name, leg) for leg in legs]
        precisions = {each.contender.name: each.contender.precision for each in taking}
        point = points(settings)[0]
        sizes = [
            Size(settings.prefix_tokens + shape.prompt_tokens, settings.prefix_tokens, shape.output_tokens)
            for shape in shapes(settings, point, settings.requests, trace)
        ]
        at_once = point.concurrency or len(sizes)
        for result in results(legs):
            precision = precisions[result.server]
            floor = floor_seconds(self._machine, self._model, precision, sizes, at_once)
            self.rows.append(row(workload.name, precision, result, floor))


def _target(server: Running, settings: BenchSettings) -> Target:
    contender: Contender = server.contender
    own = msgspec.structs.replace(settings, ignore_eos=contender.ignore_eos, extra_body=contender.extra_body)
    client = ClientSettings(url=server.url, model=contender.model)
    return Target(client, own, frozenset({server.pid}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    add = parser.add_argument
    add("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="which peers; all if unset")
    add("--workloads", nargs="+", default=["W1", "W2", "W3", "W4"], choices=["W1", "W2", "W3", "W4"])
    add("--quick", action="store_true", help="shorter workloads and two rounds, for a first look only")
    add("--rounds", type=int, help="rounds of every workload (5, quick: 2)")
    add("--sfllm-args", default="", help="more arguments for sfllm serve, such as '--max-batch-size 64'")
    add("--preload", nargs="*", default=[], help="libraries to preload for vLLM where they are not found")
    add("--max-disturbance", type=float, default=0.1, help="drop rounds with more cores used by others")
    add("--quiet-seconds", type=float, default=120.0, help="longest wait for other processes to rest")
    add("--cache", type=Path, default=cache_directory() / "peers", help="where the peers are installed")
    add("--out", type=Path, default=Path("bench/results"), help="where the results are written")
    add("--install-only", action="store_true", help="install, print the commands and stop")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 5)
    arguments.peers = [name for name in arguments.peers if name != OURS]
    return arguments


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CommandError, InstallError, StartError) as error:
        sys.exit(f"bench-peers: {error}")
