"""`python -m chaos`: break a fleet for a while and report what clients noticed."""

from __future__ import annotations

import argparse
import asyncio
import functools
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from chaos.conduct import Run
from chaos.fleet import Fleet
from chaos.judge import Excuse
from chaos.layout import ENGINES, Engine, FleetOptions
from chaos.plan import make_plan
from chaos.report import Report
from chaos.templates import make_templates

if TYPE_CHECKING:
    from chaos.recompute import Recomputed

DRAIN_SECONDS = 120.0
WORKER_DRAIN_SECONDS = 2.0
LOGPROB_TOLERANCE = {"mock": 0.0, "tiny": 1e-3, "smollm2": 1e-3}
"""The real model computes a moved stream in other shapes, so its last digits differ."""

LONGEST_ANSWER = {"mock": 200, "tiny": 600, "smollm2": 60}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long clients ask")
    parser.add_argument("--seed", type=int, default=None, help="of requests and faults; drawn if unset")
    parser.add_argument("--engine", choices=["mock", "tiny", "smollm2"], default="mock")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--streams", type=int, default=40, help="clients at once")
    parser.add_argument("--templates", type=int, default=32, help="different requests")
    parser.add_argument("--fault-every", type=float, default=4.0, help="mean seconds between faults")
    parser.add_argument("--lease-seconds", type=float, default=2.0)
    parser.add_argument("--report", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--logs", type=Path, default=None, help="where the processes' logs go")
    return parser.parse_args()


def near_ties(engine: Engine) -> Excuse:
    """A model in this process that knows where another token is as right, loaded when it is asked."""

    @functools.cache
    def model() -> Recomputed:
        from chaos.recompute import Recomputed  # noqa: PLC0415 - torch takes a second and is seldom needed

        flags = ENGINES[engine]
        return Recomputed(str(flags["model"]), str(flags["load_format"]))

    return lambda difference, delivery: model().excuses(difference, delivery)


async def run(options: argparse.Namespace) -> Report:
    """The whole run."""
    rng = random.Random(options.seed)
    templates = make_templates(rng, options.templates, LONGEST_ANSWER[options.engine])
    fleet = Fleet(
        FleetOptions(
            engine=options.engine,
            workers=options.workers,
            gateways=options.gateways,
            beat_seconds=options.lease_seconds / 4,
            lease_seconds=options.lease_seconds,
            worker={"drain_seconds": WORKER_DRAIN_SECONDS},
            gateway={"drain_seconds": DRAIN_SECONDS},
        ),
        options.logs,
    )
    targets = [service.name for service in fleet.services]
    plan = make_plan(rng, targets, options.seconds, options.fault_every, options.lease_seconds)
    print("The plan:", *plan, sep="\n", flush=True)
    started = time.monotonic()
    async with fleet:
        conducted = Run(
            fleet,
            options.seed,
            logprob_tolerance=LOGPROB_TOLERANCE[options.engine],
            excuse=None if options.engine == "mock" else near_ties(options.engine),
        )
        asked = await conducted.calm(templates)
        print(f"{len(asked)} requests answered in calm; logs in {fleet.logs}", flush=True)
        await conducted.storm(asked, plan, options.streams, options.seconds)
        await fleet.wait_ready()
        leaks = await fleet.leaks()
        codes = await fleet.stop()
    return Report(
        command=f"python -m chaos {' '.join(sys.argv[1:])} (seed {options.seed})",
        seconds=time.monotonic() - started,
        tally=conducted.tally,
        faults=conducted.faults,
        moves=conducted.moves,
        leaks=leaks,
        exit_codes=codes,
        problems=conducted.problems,
    )


def main() -> int:
    """Run and report; 1 when anything went wrong."""
    options = arguments()
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(10**6)
    if options.logs is None:
        options.logs = Path(tempfile.mkdtemp(prefix="sfllm-chaos-"))
    print(f"seed {options.seed}", flush=True)
    report = asyncio.run(run(options))
    print(report.table())
    if options.report is not None:
        report.write(options.report)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
