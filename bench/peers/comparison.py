"""Runs the workloads against servers that are up, and keeps what came out."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from bench.peers.contenders import Contender
from bench.peers.processes import Running
from bench.peers.results import Row, row
from bench.peers.roofline import Machine, ModelSize, Size, floor_seconds
from bench.peers.shortening import done_after, why_not
from bench.peers.starts import Start, start_of
from bench.peers.workloads import (
    PACED,
    SATURATED,
    SEED_ROUNDS,
    Workload,
    closed_workloads,
    paced_workload,
    seed_workloads,
)
from bench.peers.writing import Written, write
from rich.console import Console

from sfllm_cli.bench.command import Target, benchmark, read_trace
from sfllm_cli.bench.rounds import Leg, results
from sfllm_cli.bench.workload import points, shapes
from sfllm_cli.bench_settings import BenchSettings
from sfllm_cli.errors import CommandError
from sfllm_cli.settings import ClientSettings

MAX_REPEATS = 1
"""How often a disturbed round is repeated: the slow servers take minutes for one."""


class Options(NamedTuple):
    """What to run, and when a round counts as disturbed."""

    workloads: Sequence[str]
    rounds: int
    quick: bool = False
    max_disturbance: float = 0.1
    quiet_seconds: float = 30.0


class Comparison:
    """The servers that run, and what was measured of them so far, written down after every round."""

    def __init__(self, options: Options, model: ModelSize, machine: Machine, written: Written) -> None:
        self._options = options
        self._model = model
        self._machine = machine
        self._written = written
        self._running: list[Running] = []
        self._starts: list[Start] = []
        self._rows: dict[str, list[Row]] = {}
        self._legs: dict[str, list[Leg]] = {}
        self._settings: dict[str, BenchSettings] = {}
        self._slow: dict[str, set[str]] = {}
        self._notes: list[str] = []

    @property
    def rows(self) -> list[Row]:
        """A row for each server on each workload, in the order in which they ran."""
        return [each for rows in self._rows.values() for each in rows]

    def add(self, starts: Sequence[Running]) -> None:
        """Take part with a server that was started so often; the last one runs."""
        self._running.append(starts[-1])
        self._starts.append(start_of(starts, starts[-1].memory_bytes()))

    def note(self, text: str) -> None:
        """Say something in the report and now."""
        print(text, file=sys.stderr, flush=True)
        self._notes.append(text)

    def run(self) -> str:
        """All workloads; what to print, whose last line is the ratios."""
        chosen, quick = self._options.workloads, self._options.quick
        for workload in closed_workloads(quick):
            if workload.group in chosen:
                self._measure(workload, self._options.rounds)
        saturated = self._rows.get(SATURATED, [])
        capacities = [each.requests_per_second for each in saturated if not each.is_ours]
        capacities = capacities or [each.requests_per_second for each in saturated]
        if any(capacities):
            self._measure(paced_workload(quick, max(capacities)), self._options.rounds)
        if "seed" in chosen:
            for workload in seed_workloads(quick):
                self._measure(workload, min(SEED_ROUNDS, self._options.rounds))
        return self._write(complete=True)

    def _write(self, *, complete: bool) -> str:
        return write(
            self._written,
            rows=self.rows,
            legs=[(name, leg) for name, legs in self._legs.items() for leg in legs],
            starts=self._starts,
            notes=self._notes if complete else [*self._notes, "the run did not come to its end"],
            machine=self._machine,
            settings=self._settings,
            quick=self._options.quick,
            complete=complete,
        )

    def _taking(self, workload: Workload) -> list[Running]:
        """The servers that run it, after a look whether they still answer."""
        rate = workload.settings.request_rate[0] if workload.name.startswith(PACED) else None
        taking = []
        for server in list(self._running):
            contender = server.contender
            if workload.group not in contender.workloads:
                continue
            if reason := why_not(contender.name, workload.group, rate, self.rows):
                self.note(f"{contender.name} did not run {workload.name}: {reason}")
            elif not server.is_alive():
                self._running.remove(server)
                self.note(f"{contender.name} did not answer before {workload.name} and was left out since")
            else:
                taking.append(server)
        return taking

    def _measure(self, workload: Workload, rounds: int) -> None:
        print(f"{workload.name}: {workload.title}", file=sys.stderr, flush=True)
        settings = msgspec.structs.replace(
            workload.settings,
            rounds=rounds,
            max_disturbance=self._options.max_disturbance,
            max_repeats=MAX_REPEATS,
            quiet_seconds=self._options.quiet_seconds,
        )
        self._settings[workload.name] = settings
        taking = {each.contender.name: each for each in self._taking(workload)}
        precisions = {name: each.contender.precision for name, each in taking.items()}

        def after_round(legs: Sequence[Leg]) -> set[str]:
            done = done_after(legs, precisions)
            if legs[-1].round < rounds:
                self._slow[workload.name] = self._slow.get(workload.name, set()) | done
            self._keep(workload, settings, taking, legs)
            self._write(complete=False)
            return done

        if not taking:
            return
        targets = {name: _target(each, settings) for name, each in taking.items()}
        try:
            asyncio.run(benchmark(settings, targets, read_trace(settings), Console(stderr=True), after_round))
        except CommandError as error:
            self.note(f"{workload.name} ended early: {error}")
        self._starts = [
            start._replace(memory_bytes=self._memory(start.server) or start.memory_bytes)
            for start in self._starts
        ]

    def _memory(self, name: str) -> int:
        server = next((each for each in self._running if each.contender.name == name), None)
        return server.memory_bytes() if server is not None else 0

    def _keep(
        self, workload: Workload, settings: BenchSettings, taking: dict[str, Running], legs: Sequence[Leg]
    ) -> None:
        """Make the rows of a workload from its rounds so far."""
        self._legs[workload.name] = list(legs)
        made = []
        for result in results(legs):
            contender = taking[result.server].contender
            own = _own_settings(contender, settings)
            sizes, at_once = _sizes(own)
            floor = floor_seconds(self._machine, self._model, contender.precision, sizes, at_once)
            fewer = own.requests < settings.requests
            notes = ["slow"] if result.server in self._slow.get(workload.name, ()) else []
            notes += [f"{own.requests} of the {settings.requests} requests"] if fewer else []
            made.append(row(workload.name, contender.precision, result, floor, "; ".join(notes)))
        self._rows[workload.name] = made


def _sizes(settings: BenchSettings) -> tuple[list[Size], int]:
    """What the requests of a workload are, and how many of them are open at once."""
    point, prefix = points(settings)[0], settings.prefix_tokens
    sizes = [
        Size(prefix + shape.prompt_tokens, prefix, shape.output_tokens)
        for shape in shapes(settings, point, settings.requests, read_trace(settings))
    ]
    return sizes, point.concurrency or len(sizes)


def _own_settings(contender: Contender, settings: BenchSettings) -> BenchSettings:
    return msgspec.structs.replace(
        settings,
        requests=min(settings.requests, contender.most_requests or settings.requests),
        ignore_eos=contender.ignore_eos,
        extra_body=contender.extra_body,
    )


def _target(server: Running, settings: BenchSettings) -> Target:
    contender = server.contender
    client = ClientSettings(url=server.url, model=contender.model)
    return Target(client, _own_settings(contender, settings), frozenset({server.pid}))
