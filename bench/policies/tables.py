"""Markdown tables of what `python -m bench.policies` found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BASELINE = "fcfs"
TAIL_LOAD = 0.8
TITLES = {
    "conversation": "(a) conversation",
    "two-sizes": "(b) 64 and 4,096",
    "uniform": "(c) 100 to 1,024",
    "chats": "(d) chats",
    "equal": "(e) all equal",
}

Line = dict[str, Any]


def tables(lines: Sequence[Line]) -> str:
    """Goodput under each load and at its best, and the tail at 80% load, as multiples of the baseline's."""
    policies = [name for name in dict.fromkeys(line["policy"] for line in lines) if name != BASELINE]
    loads = list(dict.fromkeys(line["load"] for line in lines))
    parts = []
    for policy in policies:
        head = ["mix", "workers", f"{BASELINE} at its best, good/s"]
        head += [f"at {load:g}" for load in loads] + ["at its best", f"TTFT p99 at {TAIL_LOAD:g}"]
        rows = [_row(mix, workers, policy, loads, lines) for mix, workers in _cases(lines)]
        parts.append(
            "\n".join([f"`{policy}` beside `{BASELINE}`:", "", _line(head), _rule(head), *map(_line, rows)])
        )
    return "\n\n".join(parts)


def _cases(lines: Sequence[Line]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((line["mix"], line["workers"]) for line in lines))


def _row(mix: str, workers: int, policy: str, loads: Sequence[float], lines: Sequence[Line]) -> list[str]:
    found = {
        (line["policy"], line["load"]): line["figures"]
        for line in lines
        if (line["mix"], line["workers"]) == (mix, workers)
    }
    good = {place: figures["good_per_second"] for place, figures in found.items()}
    best = {
        name: max(value for (own, _), value in good.items() if own == name) for name in (policy, BASELINE)
    }
    tail = [found.get((name, TAIL_LOAD)) for name in (policy, BASELINE)]
    return [
        TITLES.get(mix, mix),
        str(workers),
        f"{best[BASELINE]:.1f}",
        *(_ratio(good.get((policy, load)), good.get((BASELINE, load))) for load in loads),
        _ratio(best[policy], best[BASELINE]),
        _ratio(*(each["ttft"]["p99"] if each else None for each in tail)),
    ]


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}x" if value is not None and base else "-"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(cells: Sequence[str]) -> str:
    return "|" + "---|" * len(cells)
