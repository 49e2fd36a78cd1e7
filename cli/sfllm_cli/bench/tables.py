"""What `sfllm bench` prints: the figures of one server in full, or a line for each server and point."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from sfllm_cli.bench.figures import Figures
from sfllm_cli.bench.rounds import Result, Server
from sfllm_cli.bench_settings import BenchSettings

LAG_WARNING_SECONDS = 0.01


def show(
    console: Console, settings: BenchSettings, servers: Sequence[Server], results: Sequence[Result]
) -> None:
    """Print the results, and what a reader must know to judge them."""
    for server in servers:
        _line(
            console,
            f"{server.name}: {server.model} at {server.url} "
            f"(prompts of {'token ids' if server.token_ids else 'words'})",
        )
    if len(results) == 1:
        _in_full(console, results[0])
    else:
        _compared(console, settings, results)
        for line in ratios(results):
            _line(console, line)
    for line in remarks(results, settings):
        _line(console, line, style="yellow")
    for result in results:
        for error, count in result.figures.errors.items():
            _line(console, f"{count} failed: {error}", style="red")


def remarks(results: Sequence[Result], settings: BenchSettings) -> list[str]:
    """Sentences about what limits the worth of the figures."""
    lines = []
    for result in results:
        who = f"{result.server}, {result.point.label}"
        if result.figures.tokens_counted_by != "usage":
            lines.append(f"{who}: the server sends no usage, so each piece of a stream counts as one token.")
        disturbed = [leg for leg in result.legs if leg.disturbed]
        if result.dropped:
            lines.append(f"{who}: {result.dropped} rounds were dropped, because other processes were busy.")
        if disturbed:
            most = max(disturbed, key=lambda leg: leg.cpu.others)
            lines.append(
                f"{who}: {len(disturbed)} of {len(result.legs)} rounds were disturbed: other processes used "
                f"up to {most.cpu.others:.2f} cores ({', '.join(most.cpu.names) or 'not seen which'})."
            )
        lag = max(leg.lag.p95 for leg in result.legs)
        if lag > LAG_WARNING_SECONDS:
            lines.append(
                f"{who}: this client was short of CPU: its event loop ran {lag * 1000:.1f} ms late (p95), "
                "which is in the latencies. Run it on another machine, or with a lower load."
            )
    if settings.rounds > 1 and any(math.isnan(leg.cpu.others) for result in results for leg in result.legs):
        lines.append("Whether other processes disturbed the rounds is unknown where the server's are.")
    return lines


def ratios(results: Sequence[Result]) -> list[str]:
    """For each point, the output tokens a second of the first server as a multiple of the others'."""
    lines = []
    for point in dict.fromkeys(result.point for result in results):
        first, *others = [result for result in results if result.point == point]
        parts = [
            f"{_divided(first.figures, other.figures):.2f}x {other.server}"
            for other in others
            if other.figures.output_tokens_per_second
        ]
        if parts:
            lines.append(f"{point.label}: {first.server} is {', '.join(parts)} in output tokens/s")
    return lines


def _divided(first: Figures, other: Figures) -> float:
    return first.output_tokens_per_second / other.output_tokens_per_second


def _in_full(console: Console, result: Result) -> None:
    figures, leg = result.figures, result.legs[0]
    sent = figures.completed + figures.failed
    medians = f" (medians of {len(result.legs)} rounds)" if len(result.legs) > 1 else ""
    _line(
        console,
        f"{figures.completed:.0f} of {sent:.0f} requests, {result.point.label}, "
        f"in {figures.seconds:.2f} s{medians}",
    )
    table = Table("milliseconds", *(("mean", "p50", "p95", "p99")), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, summary in (
        ("time to first token (TTFT)", figures.ttft),
        ("between arrivals (ITL)", figures.itl),
        ("per output token (TPOT)", figures.tpot),
        ("end to end", figures.end_to_end),
    ):
        values = (summary.mean, summary.p50, summary.p95, summary.p99)
        table.add_row(name, *(f"{value * 1000:.2f}" for value in values))
    console.print(table)
    _line(
        console,
        f"{figures.requests_per_second:.2f} requests/s, "
        f"{figures.output_tokens_per_second:.1f} output tokens/s, "
        f"{figures.total_tokens_per_second:.1f} total tokens/s "
        f"({figures.prompt_tokens:.0f} prompt, {figures.output_tokens:.0f} output, "
        f"counted by {figures.tokens_counted_by})",
    )
    _line(
        console,
        f"goodput {figures.good_requests_per_second:.2f} requests/s ({figures.good_share:.0%} in target); "
        f"CPU cores: server {leg.cpu.server:.2f}, client {leg.cpu.client:.2f}, machine {leg.cpu.machine:.2f}",
    )


def _compared(console: Console, settings: BenchSettings, results: Sequence[Result]) -> None:
    table = Table(
        *("load", "server", "req/s", "good/s", "tok/s", "TTFT p50/p99", "ITL p50/p99", "TPOT p50/p99"),
        *("end to end mean", "cores", "rounds"),
        box=None,
        pad_edge=False,
        title=f"medians of up to {settings.rounds} rounds; latencies in milliseconds",
        title_justify="left",
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for result in results:
        figures = result.figures
        table.add_row(
            result.point.label,
            result.server,
            f"{figures.requests_per_second:.2f}",
            f"{figures.good_requests_per_second:.2f}",
            f"{figures.output_tokens_per_second:.1f}",
            *(
                f"{summary.p50 * 1000:.1f} / {summary.p99 * 1000:.1f}"
                for summary in (figures.ttft, figures.itl, figures.tpot)
            ),
            f"{figures.end_to_end.mean * 1000:.0f}",
            f"{result.legs[0].cpu.server:.2f}",
            str(len(result.legs)),
        )
    # Narrow terminals and files get whole lines rather than cells broken in two.
    console.print(table, soft_wrap=True, crop=False)


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
