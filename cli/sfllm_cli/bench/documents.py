"""The files that `sfllm bench` writes: JSON, CSV, and with matplotlib the plots and the HTML report."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from sfllm_cli.bench.cpu import CpuUse
from sfllm_cli.bench.rounds import Leg, Result, Server
from sfllm_cli.bench.tables import ratios, remarks
from sfllm_cli.bench.workload import Point
from sfllm_cli.bench_settings import BenchSettings
from sfllm_cli.errors import CommandError

_SUMMARIES = ("ttft", "itl", "tpot", "end_to_end")
_CPU = ("server", "client", "others", "machine")


def need_plots() -> None:
    """Raises `CommandError` when plots cannot be drawn here, so that it is known before the load."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--html and --png need matplotlib: pip install 'sfllm[bench]'")


def write(
    settings: BenchSettings, servers: Sequence[Server], results: Sequence[Result], legs: Sequence[Leg]
) -> None:
    """Write whichever files were asked for. Raises `CommandError` for one that cannot be written."""
    if settings.json is not None:
        text = json.dumps(document(settings, servers, results, legs), indent=2, allow_nan=False) + "\n"
        if settings.json == "-":
            sys.stdout.write(text)
        else:
            _save("json", settings.json, text.encode())
    if settings.csv is not None:
        _save("csv", settings.csv, csv_lines(legs).encode())
    if settings.png is None and settings.html is None:
        return
    # Imported here: matplotlib takes most of a second, and few runs need it.
    from sfllm_cli.bench.html import page  # noqa: PLC0415 # see above
    from sfllm_cli.bench.plots import draw  # noqa: PLC0415 # see above

    if settings.png is not None:
        _save("png", settings.png, draw(results, "png"))
    if settings.html is not None:
        picture = draw(results, "svg").decode()
        remarked = [*ratios(results), *remarks(results, settings)]
        _save(
            "html",
            settings.html,
            page(shown_settings(settings), servers, results, legs, remarked, picture).encode(),
        )


def document(
    settings: BenchSettings, servers: Sequence[Server], results: Sequence[Result], legs: Sequence[Leg]
) -> dict[str, Any]:
    """Everything that was measured, as plain values; what has no value is null."""
    return {
        "settings": shown_settings(settings),
        "servers": {
            server.name: {
                "url": server.url,
                "model": server.model,
                "prompts": "token ids" if server.token_ids else "words",
            }
            for server in servers
        },
        "results": [
            {
                "server": result.server,
                **_point(result.point),
                "rounds": len(result.legs),
                "dropped_rounds": result.dropped,
                "disturbed_rounds": sum(leg.disturbed for leg in result.legs),
                **result.figures.to_json(),
            }
            for result in results
        ],
        "rounds": [
            {
                "server": leg.server,
                **_point(leg.point),
                "round": leg.round,
                "attempt": leg.attempt,
                "kept": leg.kept,
                "disturbed": leg.disturbed,
                "cpu_cores": {
                    **_cores(leg.cpu),
                    "server_by_process": {name: round(cores, 4) for name, cores in leg.cpu.parts},
                    "busiest_others": list(leg.cpu.names),
                },
                "client_lag_seconds": leg.lag.to_json(),
                **leg.figures.to_json(),
            }
            for leg in legs
        ],
    }


def shown_settings(settings: BenchSettings) -> dict[str, Any]:
    """The settings without the key; an infinite rate as the word that stands for it."""
    values = {name: value for name, value in msgspec.structs.asdict(settings).items() if name != "api_key"}
    values["request_rate"] = [_rate(rate) for rate in settings.request_rate]
    return values


def csv_lines(legs: Sequence[Leg]) -> str:
    """One line a leg under a line of names; latencies in milliseconds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    plain = ("completed", "failed", "seconds", "prompt_tokens", "output_tokens", "tokens_counted_by")
    rates = ("requests_per_second", "output_tokens_per_second", "total_tokens_per_second")
    goodput = ("good_requests_per_second", "good_share")
    parts = ("mean", "p50", "p95", "p99")
    writer.writerow(
        (
            *("server", "concurrency", "request_rate", "round", "attempt", "kept", "disturbed"),
            *(*plain, *rates, *goodput),
            *(f"{name}_{part}_ms" for name in _SUMMARIES for part in parts),
            *(f"{name}_cores" for name in _CPU),
        )
    )
    for leg in legs:
        point, figures, cores = _point(leg.point), leg.figures, _cores(leg.cpu)
        summaries = (getattr(getattr(figures, name), part) for name in _SUMMARIES for part in parts)
        writer.writerow(
            (
                *(leg.server, point["concurrency"], point["request_rate"], leg.round, leg.attempt),
                *(leg.kept, leg.disturbed),
                *(getattr(figures, name) for name in (*plain, *rates, *goodput)),
                *("" if math.isnan(value) else round(value * 1000, 4) for value in summaries),
                *cores.values(),
            )
        )
    return text.getvalue()


def _point(point: Point) -> dict[str, Any]:
    rate = None if point.rate is None else _rate(point.rate)
    return {"concurrency": point.concurrency, "request_rate": rate}


def _rate(rate: float) -> float | str:
    return "inf" if math.isinf(rate) else rate


def _cores(cpu: CpuUse) -> dict[str, float | None]:
    values = {name: getattr(cpu, name) for name in _CPU}
    return {name: None if math.isnan(value) else round(value, 4) for name, value in values.items()}


def _save(flag: str, name: str, content: bytes) -> None:
    try:
        Path(name).write_bytes(content)
    except OSError as error:
        raise CommandError(f"cannot write {name}: {error.strerror}; choose another --{flag} FILE") from error
