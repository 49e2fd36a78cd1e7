"""Sets up the peers, runs one load against each of them and against sfllm in rounds, writes the results.

`make bench-peers`, or `python -m bench.peers --peers vllm llama.cpp --quick`. The last line printed is the
ratios. Results are written after every round, so that what an interrupted run measured is not lost.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from bench.peers.comparison import Comparison, Options
from bench.peers.contenders import OUR_FORMS, OURS, PEERS, Contender, Setup
from bench.peers.install import Installer, InstallError
from bench.peers.machine import measured
from bench.peers.models import Models
from bench.peers.processes import StartError, end_on_terminate
from bench.peers.roofline import ModelSize
from bench.peers.starts import started
from bench.peers.workloads import GROUPS
from bench.peers.writing import Written

from sfllm.model_files import cache_directory
from sfllm_cli.errors import CommandError


def main() -> int:
    """Run the comparison; 1 when a request or a server failed."""
    arguments = _arguments()
    end_on_terminate()
    cache: Path = arguments.cache
    models = Models.prepare(cache)
    preload, own_flags = arguments.preload, arguments.sfllm_args.split()
    setup = Setup(Installer(cache), models, os.cpu_count() or 1, own_flags, preload)
    contenders, failures = _contenders(arguments, setup)
    if arguments.install_only:
        print("\n".join(" ".join(contender.command) for contender in contenders))
        return bool(failures)
    arguments.out.mkdir(parents=True, exist_ok=True)
    logs = cache / "logs"
    logs.mkdir(exist_ok=True)
    options = Options(
        arguments.workloads,
        arguments.rounds,
        arguments.quick,
        arguments.max_disturbance,
        arguments.quiet_seconds,
    )
    written = Written(arguments.out, contenders)
    comparison = Comparison(options, ModelSize.read(models.directory), measured(), written)
    with contextlib.ExitStack() as stack:
        for contender in contenders:
            try:
                comparison.add(started(contender, logs, arguments.warm_starts, stack))
            except StartError as error:
                failures.append(str(error))
        for failure in failures:
            comparison.note(failure)
        print(comparison.run())
    return 1 if failures or any(each.failed for each in comparison.rows) else 0


def _contenders(arguments: argparse.Namespace, setup: Setup) -> tuple[list[Contender], list[str]]:
    """The servers that could be installed, ours first, and what became of the others."""
    made, failures = [OUR_FORMS[name](setup) for name in arguments.ours], []
    for name in arguments.peers:
        try:
            made.append(PEERS[name](setup))
        except InstallError as error:
            failures.append(str(error))
    return made, failures


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    add = parser.add_argument
    add("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="which peers; all if unset")
    own = [OURS, f"{OURS}-int4"]
    add("--ours", nargs="+", default=own, choices=list(OUR_FORMS), help="which forms of sfllm")
    add("--workloads", nargs="+", default=list(GROUPS), choices=GROUPS, help="which loads; all if unset")
    add("--quick", action="store_true", help="shorter workloads and two rounds, for a first look only")
    add("--rounds", type=int, help="rounds of every workload (5, quick: 2)")
    add("--warm-starts", type=int, help="starts after the first one, but of slow starters (3, quick: 0)")
    add("--sfllm-args", default="", help="more arguments for sfllm serve, such as '--max-batch-size 64'")
    add("--preload", nargs="*", default=[], help="libraries to preload for vLLM where they are not found")
    add("--max-disturbance", type=float, default=0.1, help="drop rounds with more cores used by others")
    add("--quiet-seconds", type=float, default=30.0, help="longest wait for other processes to rest")
    add("--cache", type=Path, default=cache_directory() / "peers", help="where the peers are installed")
    add("--out", type=Path, default=Path("bench/results"), help="where the results are written")
    add("--install-only", action="store_true", help="install, print the commands and stop")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 5)
    if arguments.warm_starts is None:
        arguments.warm_starts = 0 if arguments.quick else 3
    return arguments


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CommandError, InstallError, StartError) as error:
        sys.exit(f"bench-peers: {error}")
