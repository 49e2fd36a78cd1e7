"""Runs the workloads against servers that are up, and keeps what came out."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from bench.peers.contenders import Contender
from bench.peers.processes import Running
from bench.peers.results import Row, Start, draw, ratios, row, table
from bench.peers.roofline import Machine, ModelSize, Size, floor_seconds
from bench.peers.workloads import Workload, closed_workloads, paced_workload
from rich.console import Console

from sfllm_cli.bench.command import Target, benchmark, read_trace
from sfllm_cli.bench.documents import shown_settings
from sfllm_cli.bench.rounds import Leg, results
from sfllm_cli.bench.workload import points, shapes
from sfllm_cli.bench_settings import BenchSettings
from sfllm_cli.settings import ClientSettings


class Options(NamedTuple):
    """What to run, and when a round counts as disturbed."""

    workloads: Sequence[str]
    rounds: int
    quick: bool = False
    max_disturbance: float = 0.1
    quiet_seconds: float = 120.0


class Comparison:
    """The servers that run, and what was measured of them so far."""

    def __init__(self, options: Options, model: ModelSize, machine: Machine) -> None:
        self.rows: list[Row] = []
        self._options = options
        self._model = model
        self._machine = machine
        self._running: list[Running] = []
        self._legs: list[tuple[str, Leg]] = []
        self._settings: dict[str, BenchSettings] = {}

    def add(self, server: Running) -> None:
        """Take part with that server."""
        self._running.append(server)

    def run(self) -> None:
        """All workloads, W4's latencies last, as they need the capacity."""
        chosen = self._options.workloads
        for workload in closed_workloads(self._options.quick):
            if workload.group in chosen:
                self._measure(workload)
        saturated = [each for each in self.rows if each.workload == "W4 saturated"]
        peers = [each for each in saturated if not each.is_ours] or saturated
        if peers:
            capacity = max(each.requests_per_second for each in peers)
            self._measure(paced_workload(self._options.quick, capacity))

    def starts(self) -> list[Start]:
        """How each server came up, and its memory now."""
        return [Start(each.contender.name, each.start_seconds, each.memory_bytes()) for each in self._running]

    def write(self, out: Path, starts: Sequence[Start]) -> str:
        """Write the files; what to print, whose last line is the ratios."""
        text = table(self.rows, starts)
        document = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "quick": self._options.quick,
            "machine": {**self._machine._asdict(), "cores": os.cpu_count()},
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
        return f"{text}\n\nwritten to {out}: peers.md, peers.json, peers.png\n{ratios(self.rows)}"

    def _measure(self, workload: Workload) -> None:
        settings = msgspec.structs.replace(
            workload.settings,
            rounds=self._options.rounds,
            max_disturbance=self._options.max_disturbance,
            quiet_seconds=self._options.quiet_seconds,
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
