"""The comparison as rows, and from them the table, the ratios and the picture. Pure but for the plotting."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.peers.contenders import OURS
from matplotlib.figure import Figure

from sfllm_cli.bench.rounds import Leg, Result

NO_RATIO = "nothing to compare"


@dataclasses.dataclass(frozen=True)
class Row:
    """One server on one workload. Rates are medians over rounds, latencies in milliseconds."""

    workload: str
    server: str
    precision: str
    rounds: int
    disturbed: int
    failed: float
    output_tokens: float
    tokens_per_second: float
    lowest: float
    highest: float
    requests_per_second: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    end_to_end_mean: float
    server_cores: float
    roofline_share: float

    @property
    def is_ours(self) -> bool:
        """Whether it is a row of this project."""
        return self.server.startswith(OURS)

    def to_json(self) -> dict[str, Any]:
        """Plain values, null where there is none."""
        values = dataclasses.asdict(self).items()
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values
        }


class Start(NamedTuple):
    """How a server came up: seconds to its first token, and memory after the last workload."""

    server: str
    seconds: float
    memory_bytes: int


def row(workload: str, precision: str, result: Result, floor_seconds: float) -> Row:
    """The row of a result whose workload takes at least `floor_seconds`."""
    figures, rates = result.figures, [leg.figures.output_tokens_per_second for leg in result.legs]
    cores = sorted(leg.cpu.server for leg in result.legs)
    return Row(
        workload=workload,
        server=result.server,
        precision=precision,
        rounds=len(result.legs),
        disturbed=sum(leg.disturbed for leg in result.legs),
        failed=figures.failed,
        output_tokens=figures.output_tokens,
        tokens_per_second=figures.output_tokens_per_second,
        lowest=min(rates),
        highest=max(rates),
        requests_per_second=figures.requests_per_second,
        ttft_p50=figures.ttft.p50 * 1000,
        ttft_p99=figures.ttft.p99 * 1000,
        itl_p50=figures.itl.p50 * 1000,
        itl_p99=figures.itl.p99 * 1000,
        end_to_end_mean=figures.end_to_end.mean * 1000,
        server_cores=cores[len(cores) // 2],
        roofline_share=floor_seconds / figures.seconds if figures.seconds else math.nan,
    )


def table(rows: Sequence[Row], starts: Sequence[Start]) -> str:
    """The rows as Markdown."""
    names = (
        *("workload", "server", "precision", "output tok/s (rounds)", "req/s", "TTFT p50 / p99 ms"),
        *("ITL p50 / p99 ms", "end to end ms", "cores", "of the roofline"),
    )
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for each in rows:
        notes = [f"{each.failed:.0f} failed"] if each.failed else []
        notes += [f"{each.disturbed} of {each.rounds} disturbed"] if each.disturbed else []
        lines.append(
            f"| {each.workload} | {each.server} | {each.precision} "
            f"| {each.tokens_per_second:.1f} ({each.lowest:.1f} .. {each.highest:.1f})"
            f"{'; ' * bool(notes)}{', '.join(notes)} "
            f"| {each.requests_per_second:.2f} | {each.ttft_p50:.0f} / {each.ttft_p99:.0f} "
            f"| {each.itl_p50:.1f} / {each.itl_p99:.1f} | {each.end_to_end_mean:.0f} "
            f"| {each.server_cores:.2f} | {each.roofline_share:.0%} |"
        )
    lines += ["", "| server | start to first token | memory |", "|---|---|---|"]
    lines += [f"| {s.server} | {s.seconds:.1f} s | {s.memory_bytes / 2**30:.2f} GiB |" for s in starts]
    return "\n".join(lines)


def ratios(rows: Sequence[Row]) -> str:
    """In one line: our output tokens a second as a multiple of the best peer's, for each workload."""
    parts = []
    for workload in dict.fromkeys(each.workload for each in rows):
        here = [each for each in rows if each.workload == workload]
        for own in (each for each in here if each.is_ours):
            peers = [each for each in here if not each.is_ours and _same_class(each, own)]
            best = max(peers, key=lambda each: each.tokens_per_second, default=None)
            if best is not None and best.tokens_per_second:
                ratio = own.tokens_per_second / best.tokens_per_second
                parts.append(f"{workload} {own.precision} {ratio:.2f}x {best.server}")
    return "ratios: " + ("; ".join(parts) or NO_RATIO)


def draw(rows: Sequence[Row], legs: Sequence[tuple[str, Leg]]) -> bytes:
    """A PNG with a panel for each workload: output tokens a second, a dot for each kept round."""
    workloads = list(dict.fromkeys(each.workload for each in rows))
    servers = list(dict.fromkeys(each.server for each in rows))
    figure = Figure(figsize=(3.2 * len(workloads) + 1, 4.2), layout="constrained")
    panels = figure.subplots(1, len(workloads), squeeze=False)[0]
    for axes, workload in zip(panels, workloads, strict=True):
        here = [each for each in rows if each.workload == workload]
        for each in here:
            place = servers.index(each.server)
            axes.bar(place, each.tokens_per_second, color="C1" if each.is_ours else "C0", alpha=0.8)
            rounds = [
                leg.figures.output_tokens_per_second
                for name, leg in legs
                if name == workload and leg.server == each.server and leg.kept
            ]
            axes.scatter([place] * len(rounds), rounds, s=9, color="black", zorder=3)
        axes.set_xticks(range(len(servers)), servers, rotation=40, ha="right", fontsize=8)
        axes.set_title(workload, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("output tokens/s")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _is_missing(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _same_class(peer: Row, own: Row) -> bool:
    """Same precision for bf16; of quantized ones, each server's best is compared with each other's."""
    return (peer.precision == "bf16") == (own.precision == "bf16")
