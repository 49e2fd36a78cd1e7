"""Proves the worker on this machine's GPU: `make gpu-check`. Prints a row a check, the failures last.

Checks run in processes of their own, several at a time on a GPU. One that breaks its process, or takes longer
than it may, has failed, and the others go on in another process. What was found is kept after each process.

`--device cpu` runs what can run without a GPU, kernels in Triton's interpreter on tiny shapes: that proves
this program, not the GPU. `--only` takes parts of titles.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu_bench.processes import run_within
from bench.gpu_bench.results import CHECK, FOLDER, RESULTS, Results, circumstances, with_checks
from bench.gpu_check.child import UNFIT, run_here, tell
from bench.gpu_check.journal import FAILED, NOT_RUN, Journal, Outcome, summary

AREAS = ("attention", "models", "engines", "products", "layers", "sampling", "serving", "claims")
"""The longest first, as they are dealt to processes in this order."""

JOBS = 4
SECONDS = 540.0
"""How long all may take: a report of what was found in time is worth more than the last check."""


def main() -> int:
    """Run the checks; 1 when one failed or was not reached, 2 when there is no GPU."""
    arguments = _arguments()
    areas = arguments.area or list(AREAS)
    if arguments.alone:
        return run_here(Journal(arguments.alone), arguments.device, areas, arguments.only)
    if arguments.device == "cuda":
        import torch  # noqa: PLC0415 - slow, and a run on a CPU needs it in its child only

        if not torch.cuda.is_available():
            print("gpu-check: no usable GPU here, so nothing was checked", file=sys.stderr)
            return 2
        print(f"gpu-check: {'; '.join(circumstances('cuda', arguments.commit).values())}", flush=True)
    else:
        print(f"gpu-check on a CPU, Python {platform.python_version()}: this proves no GPU", flush=True)
    outcomes = run(arguments, areas)
    print(summary(outcomes))
    return any(outcome.state in {FAILED, NOT_RUN} for outcome in outcomes)


def run(arguments: argparse.Namespace, areas: Sequence[str]) -> list[Outcome]:
    """Deal the areas to processes that run side by side; what all of them found."""
    usual = min(JOBS, (os.cpu_count() or 1) // 4) if arguments.device == "cuda" else 1
    jobs = max(1, min(arguments.jobs or usual, len(areas)))
    folder: Path = arguments.out / "check"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    deadline = time.monotonic() + arguments.seconds
    hands = [(areas[number::jobs], folder / f"{number}.jsonl") for number in range(jobs)]
    outcomes: list[Outcome] = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = {
            pool.submit(run_hand, command_of(arguments, own, path), ", ".join(own), path, deadline)
            for own, path in hands
        }
        for done in concurrent.futures.as_completed(waiting):
            outcomes += done.result()
            if arguments.device == "cuda":
                keep(arguments.out, outcomes, arguments.commit)
    return outcomes


def command_of(arguments: argparse.Namespace, areas: Sequence[str], path: Path) -> list[str]:
    """Runs these areas' checks in one process, as far as it gets."""
    command = [sys.executable, "-m", "bench.gpu_check", *areas, f"--alone={path}"]
    return [
        *command,
        f"--device={arguments.device}",
        *(["--only", *arguments.only] if arguments.only else []),
    ]


def run_hand(command: Sequence[str], name: str, path: Path, deadline: float) -> list[Outcome]:
    """Run a command, which keeps the journal at `path`, again and again until it has run all its checks."""
    code: int | None = None
    while (seconds := deadline - time.monotonic()) > 0:
        begun = len(Journal(path).begun)
        code, said = run_within(command, seconds)
        journal = Journal(path)
        if code in {0, None}:
            break
        if (title := journal.broken_off) is not None:
            outcome = Outcome(FAILED, title, f"its process ended with {code}:\n{said[-3000:]}")
        elif code == UNFIT and len(journal.begun) > begun:
            continue
        else:
            outcome = Outcome(FAILED, f"{name}: starting", f"exit code {code}:\n{said[-3000:]}")
        tell(outcome, 0.0)
        journal.end(outcome)
        if title is None:
            break
    outcomes = Journal(path).all_outcomes()
    if code is None and not outcomes:
        return [Outcome(NOT_RUN, f"{name}: starting", "there was no time left")]
    return outcomes


def keep(folder: Path, outcomes: Sequence[Outcome], commit: str | None) -> None:
    """Put what was found beside the measurements, for the report; other checks of this commit stay."""
    rows = [
        {"check": outcome.title, "outcome": outcome.state, "found": outcome.text.partition("\n")[0][:300]}
        for outcome in outcomes
    ]
    results = Results(folder / RESULTS)
    part = {**circumstances("cuda", commit), "rows": rows}
    before = results.parts.get(CHECK)
    results.keep(CHECK, part if before is None else with_checks(before, part))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    add = parser.add_argument
    add("area", nargs="*", choices=[[], *AREAS], help="which areas; all if unset")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--only", nargs="+", default=[], metavar="TEXT", help="checks whose titles have one of these")
    add("--jobs", type=int, help="processes side by side; a quarter of the cores if unset, 4 at most")
    add("--seconds", type=float, default=SECONDS, help="how long all may take together")
    add("--out", type=lambda text: Path(text).resolve(), default=FOLDER, help="where results are kept")
    add("--commit", help="the commit that is checked, where git cannot tell")
    add("--alone", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
