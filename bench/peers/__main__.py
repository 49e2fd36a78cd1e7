"""Sets up the peers, runs one load against each of them and against sfllm in rounds, writes the results.

`make bench-peers`, or `python -m bench.peers --peers vllm llama.cpp --quick`. The last line printed is the
ratios. A full run takes one to two hours, most of it waiting for the slowest peers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from bench.peers.comparison import Comparison, Options
from bench.peers.contenders import OURS, PEERS, Setup, ours
from bench.peers.install import Installer, InstallError
from bench.peers.machine import measured
from bench.peers.models import Models
from bench.peers.processes import StartError, end_on_terminate, running
from bench.peers.roofline import ModelSize

from sfllm.model_files import cache_directory
from sfllm_cli.errors import CommandError


def main() -> int:
    """Run the comparison; 1 when a request failed."""
    arguments = _arguments()
    end_on_terminate()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    cache: Path = arguments.cache
    setup = Setup(
        Installer(cache),
        Models.prepare(cache),
        os.cpu_count() or 1,
        arguments.sfllm_args.split(),
        arguments.preload,
    )
    contenders = [ours(setup), *(PEERS[name](setup) for name in arguments.peers)]
    if arguments.install_only:
        print("\n".join(" ".join(contender.command) for contender in contenders))
        return 0
    logs = cache / "logs"
    logs.mkdir(exist_ok=True)
    options = Options(
        arguments.workloads,
        arguments.rounds,
        arguments.quick,
        arguments.max_disturbance,
        arguments.quiet_seconds,
    )
    comparison = Comparison(options, ModelSize.read(setup.models.directory), measured())
    with contextlib.ExitStack() as stack:
        for contender in contenders:
            print(f"starting {contender.name}", file=sys.stderr, flush=True)
            comparison.add(stack.enter_context(running(contender, logs)))
        comparison.run()
        starts = comparison.starts()
    print(comparison.write(out, starts))
    return 1 if any(each.failed for each in comparison.rows) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    add = parser.add_argument
    add("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="which peers; all if unset")
    add("--workloads", nargs="+", default=["W1", "W2", "W3", "W4"], choices=["W1", "W2", "W3", "W4"])
    add("--quick", action="store_true", help="shorter workloads and two rounds, for a first look only")
    add("--rounds", type=int, help="rounds of every workload (5, quick: 2)")
    add("--sfllm-args", default="", help="more arguments for sfllm serve, such as '--max-batch-size 64'")
    add("--preload", nargs="*", default=[], help="libraries to preload for vLLM where they are not found")
    add("--max-disturbance", type=float, default=0.1, help="drop rounds with more cores used by others")
    add("--quiet-seconds", type=float, default=120.0, help="longest wait for other processes to rest")
    add("--cache", type=Path, default=cache_directory() / "peers", help="where the peers are installed")
    add("--out", type=Path, default=Path("bench/results"), help="where the results are written")
    add("--install-only", action="store_true", help="install, print the commands and stop")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 5)
    arguments.peers = [name for name in arguments.peers if name != OURS]
    return arguments


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CommandError, InstallError, StartError) as error:
        sys.exit(f"bench-peers: {error}")
