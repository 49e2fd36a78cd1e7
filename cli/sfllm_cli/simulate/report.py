"""What `sfllm simulate` prints and writes: a line for each run, the ratios, JSON, CSV, plots."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from sfllm_cli.errors import CommandError
from sfllm_cli.simulate.figures import Figures
from sfllm_cli.simulate.profiles import Profile
from sfllm_cli.simulate_settings import SimulateSettings

BASELINE = "fcfs"
NO_PART = (
    *("json", "csv", "png", "timing"),
    *("calibrate", "calibrate_workers", "calibrate_slots", "calibrate_kv_tokens"),
    *("calibrate_step_tokens", "profile_out"),
)
"""Settings that have no part in what comes out."""

OF_SEVERAL = ("schedulers", "kill_scheduler_at", "restart_scheduler_after")
"""Settings that have none where there is one scheduler."""

TABLE_WIDTH = 200
"""Narrow terminals and files get whole lines rather than cells broken in two."""


class Run(NamedTuple):
    """One policy under one load; `load` is a share of the capacity, if it was given so."""

    policy: str
    load: float | None
    rate: float
    figures: Figures


def show(console: Console, settings: SimulateSettings, profile: Profile, runs: Sequence[Run]) -> None:
    """Print the runs, and last the ratios."""
    what = settings.trace or settings.mix
    behind = f" behind {settings.schedulers} schedulers" if settings.schedulers > 1 else ""
    _line(console, f"{settings.workers} workers{behind}, {what}, {settings.requests} requests a run")
    _line(console, f"a worker: {profile.source}")
    table = Table(
        *("load", "policy", "come/s", "served/s", "tok/s", "good/s", "good"),
        *(
            "TTFT p50/p95/p99",
            "ITL p50/p99",
            "end p50/p99",
            "spread",
            "hits",
            "fair",
            "passed",
            "preempted",
            "lost",
        ),
        box=None,
        pad_edge=False,
        title="latencies in milliseconds",
        title_justify="left",
    )
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for run in runs:
        table.add_row(*_row(run))
    wide = Console(file=console.file, width=max(console.width, TABLE_WIDTH))
    wide.print(table, soft_wrap=True, crop=False)
    for run in runs:
        for error, count in run.figures.errors.items():
            _line(console, f"{run.policy} at {_load(run)}: {count} ended with {error}")
    for line in ratios(runs):
        _line(console, line)


def ratios(runs: Sequence[Run]) -> list[str]:
    """Each policy beside first come first served, or the last one: under each load, and at its best."""
    policies = list(dict.fromkeys(run.policy for run in runs))
    if len(policies) < 2:
        return []
    base = BASELINE if BASELINE in policies else policies[-1]
    lines = []
    for load in dict.fromkeys(_load(run) for run in runs):
        here = {run.policy: run.figures for run in runs if _load(run) == load}
        if len(here) < len(policies):
            continue  # a search tries some loads with some policies only
        parts = [
            f"{policy} {_ratio(here[policy].good_per_second, here[base].good_per_second)} goodput, "
            f"{_ratio(here[policy].ttft.p99, here[base].ttft.p99)} TTFT p99"
            for policy in policies
            if policy != base
        ]
        lines.append(f"beside {base} at {load}: {'; '.join(parts)}")
    best = {
        policy: max(run.figures.good_per_second for run in runs if run.policy == policy)
        for policy in policies
    }
    parts = [f"{policy} {_ratio(best[policy], best[base])}" for policy in policies if policy != base]
    lines.append(f"best goodput over all loads, beside {base}: {', '.join(parts)}")
    return lines


def write(settings: SimulateSettings, runs: Sequence[Run]) -> None:
    """Write the files that were asked for. Raises `CommandError` for one that cannot be written."""
    if settings.json is not None:
        text = json.dumps(document(settings, runs), indent=2, allow_nan=False) + "\n"
        if settings.json == "-":
            sys.stdout.write(text)
        else:
            _save(settings.json, text.encode())
    if settings.csv is not None:
        _save(settings.csv, _csv(runs).encode())
    if settings.png is not None:
        from sfllm_cli.simulate.plots import draw  # noqa: PLC0415 - matplotlib is optional

        _save(settings.png, draw(runs))


def document(settings: SimulateSettings, runs: Sequence[Run]) -> dict[str, object]:
    """Everything that made the runs, and what came of them; the same wherever it is written to."""
    left_out = NO_PART if settings.schedulers > 1 else (*NO_PART, *OF_SEVERAL)
    made = {name: value for name, value in msgspec.to_builtins(settings).items() if name not in left_out}
    return {"settings": _finite(made), "runs": [_plain(run) for run in runs]}


def _plain(run: Run) -> dict[str, object]:
    return {
        "policy": run.policy,
        "load": _finite(run.load),
        "rate": _finite(run.rate),
        **msgspec.to_builtins(run.figures),
    }


def _finite(value: object) -> object:
    """The same with null for what is infinite, such as the rate of requests that come at once."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if value == math.inf else value


def _csv(runs: Sequence[Run]) -> str:
    text = io.StringIO()
    rows = [_flat(_plain(run)) for run in runs]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(values: dict[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if name == "errors":
            flat[name] = json.dumps(value)
        elif isinstance(value, dict):
            flat.update({f"{name}_{part}": inner for part, inner in value.items()})
        else:
            flat[name] = value
    return flat


def _row(run: Run) -> list[str]:
    figures = run.figures
    milliseconds: Callable[..., str] = lambda *values: "/".join(f"{value * 1000:.0f}" for value in values)  # noqa: E731
    return [
        _load(run),
        run.policy,
        f"{run.rate:.1f}",
        f"{figures.steady_per_second:.1f}",
        f"{figures.output_tokens_per_second:.0f}",
        f"{figures.good_per_second:.1f}",
        f"{figures.good_share:.1%}",
        milliseconds(figures.ttft.p50, figures.ttft.p95, figures.ttft.p99),
        f"{figures.itl.p50 * 1000:.1f}/{figures.itl.p99 * 1000:.1f}",
        milliseconds(figures.end_to_end.p50, figures.end_to_end.p99),
        f"{figures.length_spread:.2f}",
        f"{figures.prefix_hit_share:.1%}",
        f"{figures.fairness:.3f}",
        str(figures.overtakes_most),
        str(figures.preemptions),
        str(figures.attempts_lost),
    ]


def _load(run: Run) -> str:
    return f"{run.load:g} of capacity" if run.load is not None else f"{run.rate:g}/s"


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}x" if base else "-"


def _save(path: str, content: bytes) -> None:
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
