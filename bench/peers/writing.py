"""The files of a comparison: tables for reading, JSON with every round, a picture."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.peers.contenders import Contender
from bench.peers.picture import draw
from bench.peers.results import Row
from bench.peers.roofline import Machine
from bench.peers.starts import Start
from bench.peers.tables import ratios, report
from bench.peers.workloads import seed_workloads

from sfllm_cli.bench.documents import shown_settings
from sfllm_cli.bench.rounds import Leg
from sfllm_cli.bench_settings import BenchSettings


class Written(NamedTuple):
    """Where results go, and how the servers are started, for the record."""

    out: Path
    contenders: Sequence[Contender]


def write(
    written: Written,
    *,
    rows: Sequence[Row],
    legs: Sequence[tuple[str, Leg]],
    starts: Sequence[Start],
    notes: Sequence[str],
    machine: Machine,
    settings: Mapping[str, BenchSettings],
    quick: bool,
    complete: bool,
) -> str:
    """Write them anew; what to print, whose last line is the ratios. Only a complete run has a picture."""
    cores = os.cpu_count() or 1
    said = [*(["a quick run, for a first look only"] if quick else []), *notes]
    text = report(rows, starts, said, machine, cores)
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "complete": complete,
        "machine": {**machine._asdict(), "cores": cores},
        "commands": {each.name: list(each.command) for each in written.contenders},
        "settings": {name: shown_settings(each) for name, each in settings.items()},
        "notes": list(notes),
        "starts": [start._asdict() for start in starts],
        "rows": [each.to_json() for each in rows],
        "rounds": [
            {"workload": name, "server": leg.server, "round": leg.round, "attempt": leg.attempt}
            | {"kept": leg.kept, "disturbed": leg.disturbed}
            | {"other_cores": leg.cpu.others, "busiest_others": list(leg.cpu.names)}
            | {"server_by_process": dict(leg.cpu.parts)}
            | leg.figures.to_json()
            for name, leg in legs
        ],
    }
    _replace(written.out / "peers.json", json.dumps(document, indent=1).encode() + b"\n")
    _replace(written.out / "peers.md", f"{text}\n".encode())
    if complete:
        seeds = {workload.name for workload in seed_workloads(quick)}
        _replace(written.out / "peers.png", draw([each for each in rows if each.workload not in seeds]))
    return f"{text}\n\nwritten to {written.out}: peers.md, peers.json, peers.png\n{ratios(rows)}"


def _replace(file: Path, content: bytes) -> None:
    """A reader, and whoever interrupts this, finds the old content or the new one."""
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(content)
    part.replace(file)
