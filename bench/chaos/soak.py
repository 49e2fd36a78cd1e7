"""`python -m chaos.soak`: a long mixed load, or very many requests, and what memory it leaves behind."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from chaos.ask import Delivery, Reading, ask
from chaos.conduct import Run
from chaos.fleet import Fleet
from chaos.http_client import Address, Connection
from chaos.judge import judge
from chaos.layout import FleetOptions
from chaos.memory import MemoryWatch
from chaos.templates import make_templates

GROWTH_LIMIT_MIB = 16.0
LONGEST_ANSWER = 150
TEMPLATES = 40
SLOW_READERS = 3
SLOW = Reading(pause_seconds=0.3, receive_buffer_bytes=4096)
PAUSE_BETWEEN_ERRORS_SECONDS = 0.2
SAMPLES = 360


class Refused(NamedTuple):
    """A request that must be answered with `status`."""

    status: int
    path: str
    body: dict[str, Any]


REFUSED = (
    Refused(400, "/v1/completions", {"prompt": "x", "temperature": 9}),
    Refused(400, "/v1/completions", {"prompt": [1] * 100_000}),
    Refused(400, "/v1/chat/completions", {"messages": "nobody"}),
    Refused(404, "/v1/completions", {"prompt": "x", "model": "unheard-of"}),
    Refused(404, "/v1/nothing", {}),
)


async def refuse(address: Address, rng: random.Random, until: float, problems: list[str]) -> None:
    """Ask for what cannot be had."""
    while time.monotonic() < until:
        wanted = rng.choice(REFUSED)
        connection = await Connection.open(address)
        answer = await connection.request("POST", wanted.path, wanted.body)
        content = await answer.body()
        connection.close()
        if answer.status != wanted.status and len(problems) < 20:
            problems.append(f"{answer.status} instead of {wanted.status}: {content[:200]!r}")
        await asyncio.sleep(PAUSE_BETWEEN_ERRORS_SECONDS)


async def read_slowly(
    address: Address, asked: list[Delivery], rng: random.Random, until: float, problems: list[str]
) -> None:
    """Read streams more slowly than they are made; they must be complete all the same."""
    streams = [calm for calm in asked if calm.template.streams]
    while time.monotonic() < until:
        calm = rng.choice(streams)
        got = await ask(address, calm.template, reading=SLOW)
        fault = judge(calm, got)
        if (got.ended != "complete" or fault) and len(problems) < 20:
            problems.append(f"slow reader: {calm.template.name}: {got.ended} {got.error} {fault}")


async def mixed_load(fleet: Fleet, options: argparse.Namespace) -> tuple[Run, list[str]]:
    """Clients of every kind for the whole time."""
    run = Run(fleet, options.seed)
    asked = await run.calm(make_templates(random.Random(options.seed), TEMPLATES, LONGEST_ANSWER))
    address = next(iter(fleet.urls.values()))
    until = time.monotonic() + options.seconds
    problems: list[str] = []
    async with asyncio.TaskGroup() as group:
        group.create_task(refuse(address, random.Random(1), until, problems))
        for number in range(SLOW_READERS):
            group.create_task(read_slowly(address, asked, random.Random(number), until, problems))
        group.create_task(run.storm(asked, [], options.streams, options.seconds))
    return run, [*run.tally.lines, *run.problems, *problems]


async def many_requests(fleet: Fleet, options: argparse.Namespace) -> Counter[int]:
    """`options.requests` short requests over kept connections; answers by status."""
    left = iter(range(options.requests))
    statuses: Counter[int] = Counter()
    prompts = ["How many?"] * options.prompts
    body = json.dumps({"prompt": prompts, "max_tokens": 2, "ignore_eos": True}).encode()

    async def client(address: Address) -> None:
        connection = await Connection.open(address)
        for _ in left:
            answer = await connection.request("POST", "/v1/completions", body)
            await answer.body()
            statuses[answer.status] += 1
        connection.close()

    addresses = list(fleet.urls.values())
    async with asyncio.TaskGroup() as group:
        for number in range(options.streams):
            group.create_task(client(addresses[number % len(addresses)]))
    return statuses


async def soak(options: argparse.Namespace) -> dict[str, Any]:
    """The whole run; what it found, with `problems`."""
    fast = {"mock_tokens_per_second": 1e4, "mock_prefill_tokens_per_second": 1e7}
    fleet = Fleet(
        FleetOptions(
            workers=options.workers,
            gateways=options.gateways,
            relays=False,
            worker=fast if options.requests else {},
        ),
        options.logs,
    )
    found: dict[str, Any] = {"seed": options.seed}
    async with fleet:
        memory = MemoryWatch(fleet.services, max(0.5, options.seconds / SAMPLES))
        watching = asyncio.create_task(memory.run())
        started = time.monotonic()
        if options.requests:
            statuses = await many_requests(fleet, options)
            found["answers by status"] = {str(status): count for status, count in statuses.items()}
            problems = [f"{count} answers {status}" for status, count in statuses.items() if status != 200]
        else:
            run, problems = await mixed_load(fleet, options)
            found |= {"streams": run.tally.streams, "tokens": run.tally.tokens, "left": run.tally.left}
        found["seconds"] = round(time.monotonic() - started, 1)
        memory.take(found["seconds"])
        watching.cancel()
        leaks = await fleet.leaks()
        codes = await fleet.stop()
    growths = memory.growths()
    found["memory MiB"] = {name: each._asdict() for name, each in growths.items()}
    problems += [f"leak: {name} {value}" for name, value in leaks.items()]
    problems += [f"{name} ended with {code}" for name, code in codes.items() if code != 0]
    problems += [
        f"{name} grew by {each.grown} MiB, more than {GROWTH_LIMIT_MIB}"
        for name, each in growths.items()
        if each.grown > GROWTH_LIMIT_MIB
    ]
    return {**found, "problems": problems}


def main() -> int:
    """Run and report; 1 when anything went wrong or grew."""
    parser = argparse.ArgumentParser(prog="python -m chaos.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long the mixed load lasts")
    parser.add_argument("--requests", type=int, default=0, help="so many short requests instead")
    parser.add_argument(
        "--prompts", type=int, default=1, help="prompts in each of them; every prompt is a request behind it"
    )
    parser.add_argument("--streams", type=int, default=30, help="clients at once")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--logs", type=Path, default=None, help="where the processes' logs go")
    options = parser.parse_args()
    if options.logs is None:
        options.logs = Path(tempfile.mkdtemp(prefix="sfllm-soak-"))
    found = asyncio.run(soak(options))
    text = json.dumps(found, indent=2)
    print(text)
    if options.report is not None:
        options.report.write_text(text + "\n")
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
