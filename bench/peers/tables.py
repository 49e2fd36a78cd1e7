"""The results as Markdown tables and as one line of ratios. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.peers.results import BASELINE, UNQUANTIZED, Pair, Row, pairs
from bench.peers.roofline import Machine
from bench.peers.starts import Start
from bench.peers.workloads import PACED, seed_workloads

NO_RATIO = "nothing to compare"
_SEED_LOADS = tuple(workload.name for workload in seed_workloads(quick=False))
_REGARDS = {
    UNQUANTIZED: "both bf16",
    "best quantization": "the best of each, any precision",
    "quantized to bf16": "quantized to our own bf16",
    "baseline": f"to plain {BASELINE}",
}


def report(
    rows: Sequence[Row], starts: Sequence[Start], notes: Sequence[str], machine: Machine, cores: int
) -> str:
    """All tables, and the ratios as the last line."""
    parts = [
        _machine_line(machine, cores),
        main_table([each for each in rows if each.workload not in _SEED_LOADS]),
        pair_table(pairs(rows)),
        services_table(rows),
        seed_table([each for each in rows if each.workload in _SEED_LOADS], cores),
        start_table(starts),
        "\n".join(f"- {note}" for note in notes),
        ratios(rows),
    ]
    return "\n\n".join(part for part in parts if part)


def _machine_line(machine: Machine, cores: int) -> str:
    return (
        f"{cores} cores, which together read {machine.read_bytes / 1e9:.1f} GB/s and multiply at "
        f"{machine.operations / 1e9:,.0f} GFLOP/s in bfloat16 and {machine.int8_operations / 1e9:,.0f} GOP/s "
        "in int8 (measured before the run)."
    )


def main_table(rows: Sequence[Row]) -> str:
    """A line for each server on each workload."""
    names = (
        *("workload", "server", "precision", "rounds", "output tok/s (lowest .. highest)", "req/s"),
        *("TTFT p50 / p99 ms", "ITL p50 / p99 ms", "end to end ms", "cores", "of the roofline"),
    )
    return _table(
        names,
        [
            (
                *(each.workload, each.server, each.precision, _rounds(each)),
                f"{each.tokens_per_second:.1f} ({each.lowest:.1f} .. {each.highest:.1f})",
                f"{each.requests_per_second:.2f}",
                f"{each.ttft_p50:.0f} / {each.ttft_p99:.0f}",
                f"{each.itl_p50:.1f} / {each.itl_p99:.1f}",
                f"{each.end_to_end_mean:.0f}",
                f"{each.server_cores:.2f}",
                f"{each.roofline_share:.0%}",
            )
            for each in rows
        ],
    )


def pair_table(found: Sequence[Pair]) -> str:
    """What is compared with what: our figure as a multiple of the other's; of latencies, less is better."""
    if not found:
        return ""
    latencies = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
    return _table(
        ("workload", "ours", "to", "compared", "output tok/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99"),
        [
            (
                *(pair.own.workload, pair.own.server, pair.other.server, _REGARDS[pair.regard]),
                "same rate" if pair.own.workload.startswith(PACED) else f"{pair.ratio:.2f}x",
                *(_multiple(getattr(pair.own, name), getattr(pair.other, name)) for name in latencies),
            )
            for pair in found
        ],
    )


def services_table(rows: Sequence[Row]) -> str:
    """What gateway and scheduler take."""
    known = [each for each in rows if not math.isnan(each.services_cores)]
    if not known:
        return ""
    return _table(
        ("workload", "server", "gateway + scheduler"),
        [(each.workload, each.server, f"{each.services_cores:.1%} of one core") for each in known],
    )


def seed_table(rows: Sequence[Row], cores: int) -> str:
    """Requests a second, mean latency and utilization (cores in use of all cores)."""
    if not rows:
        return ""
    return _table(
        ("concurrency / requests", "server", "rounds", "requests/s", "mean latency s", "utilization"),
        [
            (
                *(each.workload, each.server, _rounds(each), f"{each.requests_per_second:.2f}"),
                *(f"{each.end_to_end_mean / 1000:.2f}", f"{each.server_cores / cores:.0%}"),
            )
            for each in rows
        ],
    )


def start_table(starts: Sequence[Start]) -> str:
    """Seconds from the command to ready, and to the end of a first answer of one token."""

    def warm(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds:.1f}"

    return _table(
        ("server", "first start: ready / first token s", "warm starts: ready / first token s", "memory"),
        [
            (
                each.server,
                f"{each.first_ready:.1f} / {each.first_token:.1f}",
                f"{warm(each.warm_ready)} / {warm(each.warm_token)}"
                + (f" (median of {each.warm_starts})" if each.warm_starts else ""),
                f"{each.memory_bytes / 2**30:.2f} GiB",
            )
            for each in starts
        ],
    )


def ratios(rows: Sequence[Row]) -> str:
    """In one line, for each workload: our output tokens a second as a multiple of the best peer's."""
    parts: dict[str, list[str]] = {}
    for pair in pairs(rows):
        workload = pair.own.workload
        if workload.startswith(PACED):
            continue
        text = f"{pair.own.precision} {pair.ratio:.2f}x {pair.other.server}"
        if pair.regard == "best quantization":
            text = f"best quantization {text} ({pair.other.precision})"
        elif pair.regard == "quantized to bf16":
            text = f"{pair.own.precision} {pair.ratio:.2f}x our bf16"
        parts.setdefault(workload, []).append(text)
    joined = "; ".join(f"{workload} {', '.join(texts)}" for workload, texts in parts.items())
    return f"ratios: {joined or NO_RATIO}"


def _rounds(each: Row) -> str:
    notes = [f"{each.failed:.0f} failed"] if each.failed else []
    notes += [f"{each.disturbed} disturbed"] if each.disturbed else []
    notes += [each.note] if each.note else []
    return "; ".join([str(each.rounds), *notes])


def _multiple(own: float, other: float) -> str:
    return "-" if math.isnan(own) or math.isnan(other) or not other else f"{own / other:.2f}x"


def _table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruled = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return "\n".join([*ruled, *(f"| {' | '.join(line)} |" for line in lines)])
