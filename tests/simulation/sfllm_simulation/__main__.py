"""Runs many seeds, or a script from a file, and shrinks what fails."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from .checks import patience
from .report import failing, quiet_logs
from .run import Result, run
from .scenario import scenario
from .script import read_script


def main() -> int:
    """Exit code 1 when something failed."""
    parser = argparse.ArgumentParser(prog="python -m sfllm_simulation", description=__doc__)
    parser.add_argument("script", nargs="?", type=Path, help="a script to run in place of seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--seeds", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--no-shrink", action="store_true", help="show failures as they are")
    parser.add_argument("--most-failures", type=int, default=1, help="stop after so many (1)")
    options = parser.parse_args()
    quiet_logs()
    if options.script is not None:
        scripts = {"script": read_script(options.script.read_text())}
    else:
        seeds = range(options.first, options.first + options.seeds)
        scripts = {f"seed {seed}": scenario(seed) for seed in seeds}
    started = time.monotonic()
    total, outcomes, failures, slowest = Counter[str](), Counter[str](), 0, 0.0
    for name, script in scripts.items():
        result: Result = run(script)
        outcomes += result.outcomes
        total += result.happened + Counter(tokens=result.tokens, moves=result.moves, events=result.events)
        slowest = max(slowest, result.slowest / patience(script))
        if result.failure is not None:
            failures += 1
            print(name, failing(script, result.failure, shrunk=not options.no_shrink), sep=": ", flush=True)
            if failures >= options.most_failures:
                break
    print(f"{time.monotonic() - started:.1f} s, {failures} failed; slowest took {slowest:.0%} of its bound")
    print("requests:", dict(outcomes))
    print("happened:", dict(total))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
