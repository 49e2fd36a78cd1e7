"""The HTML report: one file without scripts and without anything to load."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sfllm_cli.bench.figures import Figures, Summary
from sfllm_cli.bench.rounds import Leg, Result, Server

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
.dropped td { color: #999; text-decoration: line-through; }
svg { max-width: 100%; height: auto; }
"""

_FIGURES = (
    *("requests", "failed", "req/s", "good req/s", "output tok/s", "total tok/s"),
    *("TTFT p50", "p95", "p99", "ITL p50", "p95", "p99", "TPOT p50", "p95", "p99"),
    *("end to end mean", "p50", "p95", "p99"),
)


def page(
    settings: Mapping[str, Any],
    servers: Sequence[Server],
    results: Sequence[Result],
    legs: Sequence[Leg],
    remarks: Iterable[str],
    picture: str,
) -> str:
    """The report; `picture` is an SVG document with its header."""
    medians = (
        ("", (result.point.label, result.server, str(len(result.legs)), *_cells(result.figures)))
        for result in results
    )
    rounds = (
        (
            "" if leg.kept else "dropped",
            (leg.point.label, leg.server, str(leg.round), *_cells(leg.figures), *_cpu(leg)),
        )
        for leg in legs
    )
    cores = ("server cores", "client cores", "other cores")
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>sfllm bench</title><style>{_STYLE}</style></head><body>",
            "<h1>sfllm bench</h1>",
            _table(("server", "model", "address", "prompts"), [("", _server(server)) for server in servers]),
            "<ul>",
            *(f"<li>{html.escape(remark)}</li>" for remark in remarks),
            "</ul>",
            picture[picture.index("<svg") :],
            "<h2>Medians over rounds</h2><p>Latencies in milliseconds.</p>",
            _table(("load", "server", "rounds", *_FIGURES), medians),
            "<h2>Rounds</h2><p>Those struck out were disturbed by other processes, and not used.</p>",
            _table(("load", "server", "round", *_FIGURES, *cores), rounds),
            "<h2>Settings</h2>",
            _table(("setting", "value"), [("", (name, str(value))) for name, value in settings.items()]),
            "</body></html>\n",
        )
    )


def _server(server: Server) -> tuple[str, ...]:
    return (server.name, server.model, server.url, "token ids" if server.token_ids else "words")


def _cells(figures: Figures) -> tuple[str, ...]:
    def milliseconds(summary: Summary, *parts: str) -> list[str]:
        return [_number(getattr(summary, part) * 1000) for part in parts]

    return (
        f"{figures.completed:.0f}",
        f"{figures.failed:.0f}",
        _number(figures.requests_per_second),
        _number(figures.good_requests_per_second),
        _number(figures.output_tokens_per_second),
        _number(figures.total_tokens_per_second),
        *milliseconds(figures.ttft, "p50", "p95", "p99"),
        *milliseconds(figures.itl, "p50", "p95", "p99"),
        *milliseconds(figures.tpot, "p50", "p95", "p99"),
        *milliseconds(figures.end_to_end, "mean", "p50", "p95", "p99"),
    )


def _cpu(leg: Leg) -> tuple[str, ...]:
    return tuple(_number(value) for value in (leg.cpu.server, leg.cpu.client, leg.cpu.others))


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.2f}"  # noqa: RUF001 # a dash in a table cell


def _table(names: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table; each row has a CSS class and its cells."""
    lines = ["<table><tr>", *(f"<th>{html.escape(name)}</th>" for name in names), "</tr>"]
    for style, cells in rows:
        lines.append(f'<tr class="{style}">' if style else "<tr>")
        lines += [f"<td>{html.escape(cell)}</td>" for cell in cells]
        lines.append("</tr>")
    return "".join([*lines, "</table>"])
