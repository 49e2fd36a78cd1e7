"""Rounds: every server at every point of load in turn; what other processes disturbed is repeated."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import NamedTuple

from sfllm_cli.bench.cpu import CpuUse, cpu_use, snapshot
from sfllm_cli.bench.figures import Figures, Summary, Targets, figures, median_figures
from sfllm_cli.bench.sending import Advance, Sender, closed_loop, lag_recorded, open_loop
from sfllm_cli.bench.trace import Entry
from sfllm_cli.bench.workload import Point, bodies, shapes
from sfllm_cli.bench_settings import BenchSettings

QUIET_WINDOW_SECONDS = 0.5


class Server(NamedTuple):
    """A server under test.

    `settings` are those of its requests, which may need other fields than another server's.
    `roots` are its processes on this machine, empty when unknown.
    """

    name: str
    url: str
    model: str
    token_ids: bool
    sender: Sender
    settings: BenchSettings
    roots: frozenset[int] = frozenset()


class Leg(NamedTuple):
    """One measurement of one server at one point. `attempt` counts repeats, from 0."""

    server: str
    point: Point
    round: int
    attempt: int
    figures: Figures
    cpu: CpuUse
    lag: Summary
    kept: bool = True
    disturbed: bool = False


class Result(NamedTuple):
    """A server at a point over all rounds: the medians, and the rounds that they are of."""

    server: str
    point: Point
    figures: Figures
    legs: tuple[Leg, ...]
    dropped: int


Announce = Callable[[str], None]
Measure = Callable[[int], Awaitable[Leg]]
AfterRound = Callable[[Sequence[Leg]], Collection[str]]
"""Gets all legs after each round; the servers that it names take no part in the next ones."""


def all_go_on(_: Sequence[Leg]) -> Collection[str]:
    """After each round, no server is done."""
    return ()


async def measure(
    server: Server,
    point: Point,
    trace: Sequence[Entry] | None,
    number: int,
    attempt: int,
    advance: Advance,
) -> Leg:
    """One leg: make its requests, send them, and see what the machine did meanwhile."""
    settings = server.settings
    sizes = shapes(settings, point, settings.requests, trace)
    # Prompts differ in every round and repeat, and are the same for every server.
    salt = f"round {number} {attempt} {point.label}"
    requests = bodies(settings, server.model, sizes, token_ids=server.token_ids, salt=salt)
    lags: list[float] = []
    before = snapshot()
    async with lag_recorded(lags):
        if point.concurrency is not None:
            samples = await closed_loop(server.sender, requests, point.concurrency, advance)
        else:
            samples = await open_loop(server.sender, requests, [shape.at for shape in sizes], advance)
    use = cpu_use(before, snapshot(), server.roots)
    return Leg(
        server.name, point, number, attempt, figures(samples, targets(settings)), use, Summary.of(lags)
    )


async def warm_up(server: Server, trace: Sequence[Entry] | None) -> None:
    """Send requests that are not counted, one at a time."""
    settings = server.settings
    sizes = shapes(settings, Point(1), settings.warmup, trace)
    for body in bodies(settings, server.model, sizes, token_ids=server.token_ids, salt="warm-up"):
        await server.sender.send(body)


async def undisturbed(settings: BenchSettings, run: Measure, announce: Announce) -> list[Leg]:
    """The legs of one turn: the kept one last, and before it those that were disturbed and dropped.

    When all attempts were disturbed, the one that was least is kept and marked. A single round is
    never repeated: it is a quick look, on a machine that is in use.
    """
    if settings.rounds == 1:
        leg = await run(0)
        return [leg._replace(disturbed=leg.cpu.disturbed(settings.max_disturbance))]
    legs: list[Leg] = []
    for attempt in range(settings.max_repeats + 1):
        leg = await run(attempt)
        leg = leg._replace(disturbed=leg.cpu.disturbed(settings.max_disturbance))
        if not leg.disturbed:
            return [*(each._replace(kept=False) for each in legs), leg]
        legs.append(leg)
        announce(
            f"round {leg.round} of {leg.server}, {leg.point.label}: other processes used "
            f"{leg.cpu.others:.2f} cores ({', '.join(leg.cpu.names) or 'not seen which'})"
        )
    best = min(legs, key=lambda leg: leg.cpu.others)
    return [*(each._replace(kept=False) for each in legs if each is not best), best]


async def wait_until_quiet(settings: BenchSettings, server: Server) -> None:
    """Wait until other processes rest for a moment, at most as long as the settings say."""
    if not server.roots:
        return
    end = time.perf_counter() + settings.quiet_seconds
    while time.perf_counter() < end:
        before = snapshot()
        await asyncio.sleep(QUIET_WINDOW_SECONDS)
        if not cpu_use(before, snapshot(), server.roots).disturbed(settings.max_disturbance):
            return


async def all_rounds(
    settings: BenchSettings,
    servers: Sequence[Server],
    load: Sequence[Point],
    trace: Sequence[Entry] | None,
    advance: Advance,
    announce: Announce,
    after_round: AfterRound = all_go_on,
) -> list[Leg]:
    """All legs in the order in which they ran: round by round, point by point, server by server."""

    async def turn(number: int, point: Point, server: Server) -> list[Leg]:
        async def run(attempt: int) -> Leg:
            if settings.rounds > 1:
                await wait_until_quiet(settings, server)
            return await measure(server, point, trace, number, attempt, advance)

        return await undisturbed(settings, run, announce)

    legs: list[Leg] = []
    taking = list(servers)
    for number in range(1, settings.rounds + 1):
        if not taking:
            break
        for point in load:
            # Another server begins each round, so that none always runs in the wake of the same one.
            first = (number - 1) % len(taking)
            for server in (*taking[first:], *taking[:first]):
                legs += await turn(number, point, server)
        done = after_round(legs)
        taking = [server for server in taking if server.name not in done]
    return legs


def results(legs: Sequence[Leg]) -> list[Result]:
    """The medians of the kept legs of each server at each point, in the order of their first leg."""
    groups: dict[tuple[Point, str], list[Leg]] = {}
    for leg in legs:
        groups.setdefault((leg.point, leg.server), []).append(leg)
    found = []
    for (point, server), group in groups.items():
        kept = tuple(leg for leg in group if leg.kept)
        medians = median_figures([leg.figures for leg in kept])
        found.append(Result(server, point, medians, kept, len(group) - len(kept)))
    return found


def targets(settings: BenchSettings) -> Targets:
    """What goodput asks for, in seconds."""
    ttft, itl = settings.ttft_target_ms, settings.itl_target_ms
    unset = Targets()
    return Targets(unset.ttft if ttft is None else ttft / 1000, unset.itl if itl is None else itl / 1000)
