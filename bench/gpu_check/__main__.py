"""Proves the worker on this machine's GPU: `make gpu-check`. Prints a row a check, the failures last.

`--device cpu` runs what can run without a GPU, kernels in Triton's interpreter on tiny shapes: that proves
this program, not the GPU. `--only` takes areas, or parts of titles.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import runpy
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.gpu_bench.results import FOLDER, RESULTS, Results, circumstances
from bench.gpu_check import ROOT

if TYPE_CHECKING:
    from bench.gpu_check.checks import Check

AREAS = ("attention", "layers", "sampling", "products", "models", "engines", "serving")


class Outcome(NamedTuple):
    """How a check went: "ok", "FAILED" or "skipped"."""

    state: str
    title: str
    text: str


def main() -> int:
    """Run the checks; 1 when one failed, 2 when there is no GPU."""
    arguments = _arguments()
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
        runpy.run_path(str(ROOT / "tests/kernels/conftest.py"))  # mends the interpreter

    import torch  # noqa: PLC0415 - after the choice of the interpreter

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no usable GPU here, so nothing was checked", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")  # no TF32
    print(f"gpu-check on {description(arguments.device)}", flush=True)
    outcomes = run(arguments.device, arguments.area or AREAS, arguments.only)
    if arguments.device == "cuda" and not (arguments.area or arguments.only):
        keep(arguments.out, outcomes, arguments.commit)
    failed = [outcome for outcome in outcomes if outcome.state == "FAILED"]
    skipped = sum(outcome.state == "skipped" for outcome in outcomes)
    for outcome in failed:
        print(f"FAILED {outcome.title}: {outcome.text}")
    print(f"{len(outcomes) - len(failed) - skipped} passed, {len(failed)} failed, {skipped} skipped")
    return bool(failed)


def description(device: str) -> str:
    """Device and versions in a line."""
    import torch  # noqa: PLC0415 - as in `main`
    import triton  # noqa: PLC0415

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    versions = f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}"
    return f"{name}, {versions}, Python {platform.python_version()}"


def run(device: str, areas: Sequence[str], only: Sequence[str]) -> list[Outcome]:
    """Run the areas' checks, printing each as it ends."""
    from bench.gpu_check.checks import Setting  # noqa: PLC0415 - brings torch in

    setting = Setting.of(device)
    outcomes = []
    for area in areas:
        module = importlib.import_module(f"bench.gpu_check.{area}")
        checks: list[Check] = module.checks(setting)
        for check in checks:
            if only and not any(part in check.title for part in only):
                continue
            started = time.monotonic()
            outcome = outcome_of(check, setting.on_gpu)
            seconds = time.monotonic() - started
            print(
                f"{outcome.state:7} {outcome.title}: {outcome.text.splitlines()[0]} ({seconds:.1f} s)",
                flush=True,
            )
            outcomes.append(outcome)
    return outcomes


def outcome_of(check: Check, on_gpu: bool) -> Outcome:
    """Run one check, whatever comes of it."""
    if check.needs_gpu and not on_gpu:
        return Outcome("skipped", check.title, "needs a GPU")
    try:
        return Outcome("ok", check.title, check.run())
    except Exception as error:  # noqa: BLE001 - whatever went wrong is this check's result, and others follow
        place = "" if isinstance(error, AssertionError) else "\n" + traceback.format_exc(limit=-3)
        return Outcome("FAILED", check.title, f"{type(error).__name__}: {error}{place}")


def keep(folder: Path, outcomes: Sequence[Outcome], commit: str | None) -> None:
    """Put what was found beside the measurements, for the report."""
    rows = [
        {"check": outcome.title, "outcome": outcome.state, "found": outcome.text.partition("\n")[0]}
        for outcome in outcomes
    ]
    Results(folder / RESULTS).keep("check", {**circumstances("cuda", commit), "rows": rows})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    add = parser.add_argument
    add("area", nargs="*", choices=[[], *AREAS], help="which areas; all if unset")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--only", nargs="+", default=[], metavar="TEXT", help="checks whose titles have one of these")
    add("--out", type=Path, default=FOLDER, help="where a whole run on a GPU keeps what it found")
    add("--commit", help="the commit that is checked, where git cannot tell")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
