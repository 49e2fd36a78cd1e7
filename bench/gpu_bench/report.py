"""The report: a table for each stage, and beside each target what was measured. From results alone; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.gpu_bench.results import Results

TITLES = {
    "check": "Correctness (`make gpu-check`)",
    "device": "The device's own speed",
    "decode": "Decode steps through the engine, 1k of context each",
    "attention": "One layer's attention",
    "prefill": "Prefill through the engine",
    "trace": "What the device does in a steady decode trace",
    "deterministic": "What `--deterministic` costs: decode steps",
    "serving": "The stack over HTTP",
    "graphs": "What CUDA graphs are worth through the stack",
    "transformers": "transformers on the same device",
}
"""Stages in the report's order."""

REMARKS = {
    "device": "Bandwidth counts bytes read and bytes written.",
    "decode": "The floor is the time to read all weights and the keys and values once, at the copy "
    "bandwidth. Steps are measured in the engine, overlapping as they do when it serves.",
    "attention": "Bytes are those of the keys and values; chunks are causal.",
    "prefill": "Operations of the products, of causal attention, and of the head once a prompt.",
    "trace": "Idle is time in which no kernel and no copy runs, from the first to the last of a trace.",
    "serving": "`sfllm bench` against `sfllm serve` with random weights; medians of rounds.",
    "graphs": "The claim to check: up to 40% more from graphs.",
    "transformers": "The same shape with random weights.",
}


class Target(NamedTuple):
    """Something to reach: at least or at most `bound`, a number of one stage's table."""

    what: str
    stage: str
    column: str
    where: Mapping[str, object]
    bound: float
    at_least: bool = True

    def reached_by(self, value: float) -> bool:
        """Whether a measured value is on the right side."""
        return value >= self.bound if self.at_least else value <= self.bound


BURST, PACED = "512 in, 128 out, all at once", "512 in, 128 out, 16 requests/s"

TARGETS = (
    Target("decode at batch 1, % of the floor", "decode", "% of floor", {"batch": 1}, 45),
    Target("decode at batch 64, % of the floor", "decode", "% of floor", {"batch": 64}, 75),
    Target("graphs at batch 1, times eager", "decode", "eager / graphs", {"batch": 1}, 2),
    Target(f"{BURST}, requests/s", "serving", "requests/s", {"load": BURST}, 95),
    Target(f"{PACED}, ms per token", "serving", "ms per token mean", {"load": PACED}, 2.4, at_least=False),
    Target("idle in a steady decode trace, batch 64, %", "trace", "idle %", {"batch": 64}, 5, at_least=False),
)
"""For one H100, Qwen3-0.6B's shape, bfloat16."""

NOTHING = "Not measured yet."


def report(results: Results) -> str:
    """The whole document."""
    parts = [HEAD, _targets(results)]
    for stage, title in TITLES.items():
        part = results.parts.get(stage)
        remark = [REMARKS[stage]] if stage in REMARKS else []
        body = [NOTHING] if part is None else _body(part)
        parts.append("\n\n".join([f"## {title}", *remark, *body]))
    return "\n\n".join(parts) + "\n"


HEAD = """# What the GPU worker was measured to do

Written by `make gpu-check` and `make gpu-bench` ([how](gpu.md)); do not edit it by hand. Every section names
the date, the device, the versions and the commit of its figures. A section without figures has not been
measured, because no GPU was available; nothing in it is estimated."""


def _targets(results: Results) -> str:
    rows: list[dict[str, Any]] = []
    for target in TARGETS:
        value = results.value(target.stage, target.column, **target.where)
        verdict = "-" if value is None else "yes" if target.reached_by(value) else "no"
        rows.append(
            {
                "One H100, Qwen3-0.6B's shape, bfloat16": target.what,
                "target": f"{'>=' if target.at_least else '<='} {target.bound:g}",
                "measured": "not measured" if value is None else value,
                "reached": verdict,
            }
        )
    return "## Targets\n\n" + table(rows)


def _body(part: Mapping[str, Any]) -> list[str]:
    made = f"{part['date']}, {part['device']}, {part['versions']}, commit {part['commit']}"
    body = [f"{made}." + (f" Settings: `{part['settings']}`." if part.get("settings") else "")]
    if part.get("error"):
        body.append(f"The stage failed: {cell(part['error'])}")
    elif part.get("unfinished"):
        body.append("The stage broke off.")
    if part.get("rows"):
        body.append(table(part["rows"]))
    return body


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown; its columns are those of the rows, in the order of their first use."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: object) -> str:
    """Three significant digits, or all before the point."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".")
