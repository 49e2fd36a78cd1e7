"""Measures the worker on this machine's GPU: `make gpu-bench`, or `python -m bench.gpu_bench STAGE ...`.

Every stage runs in a process of its own, for eight minutes at most, and its figures are kept as soon as it
ends, and figures of a stage that breaks off up to there: stages may be measured one at a time. `report`
writes the report anew from what is there, and `report --add FILE ...` from results of other runs too.
`--device cpu --quick` runs every stage tiny, which proves this program and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.gpu_bench.processes import run_within
from bench.gpu_bench.report import report, table
from bench.gpu_bench.results import FOLDER, RESULTS, ROOT, Results, circumstances, merged

STAGES = (
    "device",
    "decode",
    "attention",
    "prefill",
    "trace",
    "deterministic",
    "serving",
    "graphs",
    "transformers",
)
STAGE_SECONDS = 480
REPORT = ROOT / "docs" / "gpu-report.md"


def main() -> int:
    """Measure and report; 1 when a stage failed, 2 when there is no GPU."""
    arguments = _arguments()
    out: Path = arguments.out
    if arguments.alone:
        measure(Results(out / RESULTS), arguments)
        return 0
    if arguments.add:
        Results(out / RESULTS).replace(merged([Results(path).parts for path in arguments.add]))
    wanted = STAGES if "all" in arguments.stages else [name for name in arguments.stages if name != "report"]
    if wanted and arguments.device == "cuda" and not has_gpu():
        print("gpu-bench: no usable GPU here, so nothing was measured", file=sys.stderr)
        return 2
    failed = [stage for stage in wanted if not run(stage, arguments)]
    real = arguments.device == "cuda" and not arguments.quick
    document: Path = arguments.report or (REPORT if real else out / "gpu-report.md")
    results = Results(out / RESULTS)
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(report(results))
    print(f"gpu-bench: wrote {document}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return bool(failed)


def run(stage: str, arguments: argparse.Namespace) -> bool:
    """Measure one stage in a process of its own; whether it went well. A failure is kept in the results."""
    command = [sys.executable, "-m", "bench.gpu_bench", stage, "--alone", f"--device={arguments.device}"]
    command += [f"--out={arguments.out}", *(["--quick"] if arguments.quick else [])]
    command += [f"--commit={arguments.commit}"] if arguments.commit else []
    started = time.monotonic()
    code, said = run_within(command, arguments.stage_seconds)
    seconds = time.monotonic() - started
    if code == 0:
        print(f"{stage}: {seconds:.0f} s", flush=True)
        return True
    last = said.strip().rpartition("\n")[2]
    error = (
        f"it took longer than {arguments.stage_seconds:.0f} s"
        if code is None
        else last or f"exit code {code}"
    )
    results = Results(arguments.out / RESULTS)
    begun = results.parts.get(stage, {})
    # A stage that broke off has left what it had measured.
    part = begun if begun.get("unfinished") else circumstances(arguments.device, arguments.commit)
    results.keep(stage, {**part, "error": error})
    print(f"{stage}: failed after {seconds:.0f} s\n{said[-2500:]}", flush=True)
    return False


def measure(results: Results, arguments: argparse.Namespace) -> None:
    """Measure the one stage, in this process, and keep each row at once."""
    [stage] = arguments.stages
    settings, work = work_of(stage, results, arguments)
    made = {**circumstances(arguments.device, arguments.commit), "settings": settings}
    rows: list[dict[str, Any]] = []
    results.keep(stage, {**made, "rows": rows, "unfinished": True})
    for row in work():
        rows.append(row)
        results.keep(stage, {**made, "rows": rows, "unfinished": True})
    results.keep(stage, {**made, "rows": rows})
    print(f"\n{stage}\n{table(rows)}", flush=True)


def work_of(
    stage: str, results: Results, arguments: argparse.Namespace
) -> tuple[str, Callable[[], Iterable[dict[str, Any]]]]:
    """A stage's settings in words, and what measures it."""
    from bench.gpu_bench import kernels, peers, stack, steps  # noqa: PLC0415 - only here torch is needed
    from bench.gpu_bench.place import Place  # noqa: PLC0415

    place = Place.of(arguments.device, arguments.quick)
    bandwidth = results.value("device", "value", what=kernels.COPY)
    of_stack = "sfllm serve " + " ".join(stack.QUICK_FLAGS if place.quick else stack.GPU_FLAGS)
    works: dict[str, tuple[str, Callable[[], Iterable[dict[str, Any]]]]] = {
        "device": ("", lambda: kernels.device_speed(place)),
        "attention": ("", lambda: kernels.attention(place)),
        "decode": ("", lambda: steps.decode(place, bandwidth and bandwidth * 1e12)),
        "prefill": ("", lambda: steps.prefill(place)),
        "trace": ("", lambda: steps.trace(place)),
        "deterministic": ("", lambda: steps.deterministic(place)),
        "serving": (of_stack, lambda: stack.serving(place)),
        "graphs": (of_stack, lambda: stack.graphs(place)),
        "transformers": ("", lambda: peers.transformers_speed(place)),
    }
    return works[stage]


def has_gpu() -> bool:
    """Whether torch can use one."""
    import torch  # noqa: PLC0415 - slow, and writing the report needs none

    return torch.cuda.is_available()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_bench", description=__doc__)
    add = parser.add_argument
    add("stages", nargs="+", choices=[*STAGES, "all", "report"], help="what to measure, in this order")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--quick", action="store_true", help="a tiny model and few steps, to try the program")
    add("--out", type=lambda text: Path(text).resolve(), default=FOLDER, help="where results are kept")
    add("--report", type=Path, help="where the report goes (docs/gpu-report.md after real runs)")
    add("--commit", help="the commit that is measured, where git cannot tell")
    add("--stage-seconds", type=float, default=STAGE_SECONDS, help="the longest that a stage may take")
    add("--add", type=Path, nargs="+", default=[], metavar="FILE", help="results of other runs, oldest first")
    add("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
