"""The command: settings in, runs one after the other, tables and files out."""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace
from rich.console import Console

from sfllm.config import parse
from sfllm_cli.bench.documents import need_plots
from sfllm_cli.bench.trace import Entry, TraceError, parse_trace
from sfllm_cli.errors import CommandError
from sfllm_cli.settings import known_settings
from sfllm_cli.simulate.calibrate import calibrate
from sfllm_cli.simulate.figures import Figures
from sfllm_cli.simulate.profiles import Profile, load_profile
from sfllm_cli.simulate.report import Run, show, write
from sfllm_cli.simulate.search import best_load
from sfllm_cli.simulate.workload import (
    CHATS,
    CHATS_AT_ONCE_RATE,
    MIXES,
    Asked,
    at_once,
    bursts,
    of_chats,
    of_mix,
    of_trace,
    poisson,
    shared_out,
)
from sfllm_cli.simulate.world import Setup, World, spread_faults
from sfllm_cli.simulate_settings import SimulateSettings
from sfllm_scheduler.core.state import PolicyValues

SATURATION = 2.0
"""Capacity is what is served when so many times of what the curve promises comes."""

CAPACITY_REQUESTS = 4000
CAPACITY_REQUESTS_A_WORKER = 60
SAMPLE = 2000
NO_BOUND = 10**9
NO_DEADLINE_SECONDS = 1e9
WORKER_WAIT_SECONDS = 600.0
GRACE = 0.9


class Cost(NamedTuple):
    """What a run took of this machine, in seconds; no part of its results."""

    seconds: float
    core_seconds: float
    events: int


def run(argv: Sequence[str]) -> int:
    """Simulate what the settings say. Raises `CommandError`."""
    settings = parse(
        SimulateSettings,
        prog="sfllm simulate",
        description="Simulate a fleet of workers behind the real scheduler, in virtual time.",
        argv=argv,
        known=known_settings(),
    )
    _check(settings)
    if settings.calibrate is not None:
        return calibrate(settings)
    if settings.png is not None:
        need_plots()
    profile, entries = fleet_profile(settings), _read_trace(settings)
    run_one = partial(_run, settings, profile, entries)
    if settings.find_goodput:
        runs = _search(settings, capacity(settings, profile, entries), run_one)
    else:
        rates = _rates(settings, profile, entries)
        runs = [run_one(policy, rate, load) for rate, load in rates for policy in settings.policy]
    show(Console(stderr=settings.json == "-"), settings, profile, runs)
    write(settings, runs)
    return 0


def _check(settings: SimulateSettings) -> None:
    """Raise `CommandError` for settings that make no sense together."""
    if settings.kill_scheduler_at is not None and settings.schedulers < 2:
        raise CommandError("--kill-scheduler-at needs another scheduler to go to: --schedulers 2 or more")
    if settings.restart_scheduler_after is not None and settings.kill_scheduler_at is None:
        raise CommandError("--restart-scheduler-after is for one that is killed: --kill-scheduler-at")


def _run(
    settings: SimulateSettings,
    profile: Profile,
    entries: Sequence[Entry] | None,
    policy: str,
    rate: float,
    load: float | None,
) -> Run:
    figures, cost = simulate(settings, profile, policy, rate, entries)
    if settings.timing:
        _say_cost(settings, cost, policy)
    return Run(policy, load, rate, figures)


def _search(
    settings: SimulateSettings, served: float, run_one: Callable[[str, float, float], Run]
) -> list[Run]:
    """All runs that it took to find the best goodput of each policy."""
    runs: list[Run] = []

    def goodput(policy: str, load: float) -> float:
        runs.append(run_one(policy, served * load, load))
        return runs[-1].figures.good_per_second

    for policy in settings.policy:
        best_load(partial(goodput, policy))
    return sorted(runs, key=lambda run: (run.load, settings.policy.index(run.policy)))


def simulate(
    settings: SimulateSettings, profile: Profile, policy: str, rate: float, entries: Sequence[Entry] | None
) -> tuple[Figures, Cost]:
    """One run of one policy at `rate` requests a second."""
    chance = random.Random(f"faults {settings.seed}").random
    values = PolicyValues(
        policy=policy,
        max_queue_requests=NO_BOUND if settings.max_queue_requests is None else settings.max_queue_requests,
        target_ttft_seconds=settings.ttft_target_ms / 1000,
        tenant_weights=tuple((f"tenant-{number}", weight) for number, weight in enumerate(settings.weights)),
        worker_wait_seconds=WORKER_WAIT_SECONDS,
    )
    if settings.max_overtakes is not None:
        values = replace(values, max_overtakes=settings.max_overtakes)
    kinds = (
        ("fail", settings.fail_share),
        ("drain", settings.drain_share),
        ("slow", settings.slow_share),
    )
    setup = Setup(
        policy=values,
        profile=profile,
        workers=settings.workers,
        gateways=settings.gateways,
        link_seconds=settings.link_ms / 1000,
        max_tokens=settings.max_tokens or None,
        ttft_target=settings.ttft_target_ms / 1000,
        itl_target=settings.itl_target_ms / 1000,
        faults=spread_faults(kinds, settings.workers, settings.requests / rate, chance),
        joining=settings.joining,
        schedulers=settings.schedulers,
        kill_scheduler_at=settings.kill_scheduler_at,
        restart_scheduler_after=settings.restart_scheduler_after,
    )
    world = World(setup, asked(settings, rate, settings.requests, entries), time.process_time)
    began = time.process_time()
    # Nothing here refers to itself, and looking for what does would take a quarter of the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        figures = world.run()
    finally:
        if collects:
            gc.enable()
    cost = Cost(time.process_time() - began, world.core_seconds, world.agenda.happened)
    return figures, cost


def asked(
    settings: SimulateSettings, rate: float, requests: int, entries: Sequence[Entry] | None
) -> Iterator[Asked]:
    """The requests of a run: the same ones for every policy."""
    source = random.Random(settings.seed)
    if entries is not None:
        stream = of_trace(entries, rate, requests)
    elif settings.mix == CHATS:
        # Chats in the order in which they come; at times that make the rate from the first one on.
        if rate == float("inf"):
            times, chats = at_once(requests), of_chats(CHATS_AT_ONCE_RATE, requests, source)
        else:
            times = poisson(rate, requests, random.Random(f"times {settings.seed}"))
            chats = of_chats(rate, requests, source)
        stream = (chat._replace(at=at) for chat, at in zip(chats, times, strict=True))
    else:
        if rate == float("inf"):
            times = at_once(requests)
        elif settings.arrivals == "bursts":
            times = bursts(rate, requests, random.Random(f"times {settings.seed}"))
        else:
            times = poisson(rate, requests, random.Random(f"times {settings.seed}"))
        stream = of_mix(MIXES[settings.mix], times, source)
    if settings.tenants:
        stream = shared_out(stream, settings.tenants, random.Random(f"tenants {settings.seed}"))
    return (each._replace(deadline=settings.deadline_seconds) for each in stream)


def _rates(
    settings: SimulateSettings, profile: Profile, entries: Sequence[Entry] | None
) -> list[tuple[float, float | None]]:
    """The rates to run, each with its share of the capacity if that is how it was given."""
    if settings.rate:
        return [(rate, None) for rate in settings.rate]
    served = capacity(settings, profile, entries)
    return [(served * load, load) for load in settings.load]


def capacity(settings: SimulateSettings, profile: Profile, entries: Sequence[Entry] | None) -> float:
    """Requests a second that the fleet serves when more come, first come first served, without faults.

    It is the fleet's own: one scheduler, and nobody is refused or ended for being late. Raises `CommandError`
    if nothing can be served.
    """
    sample = list(asked(settings, 1.0, SAMPLE, entries))
    seconds = sum(profile.request_seconds(each.prompt_tokens, each.output_tokens) for each in sample)
    promised = settings.workers * len(sample) / seconds
    requests = min(settings.requests, CAPACITY_REQUESTS + CAPACITY_REQUESTS_A_WORKER * settings.workers)
    calm = replace(
        settings,
        requests=requests,
        **dict.fromkeys(("fail_share", "drain_share", "slow_share"), 0.0),
        joining=0,
        schedulers=1,
        kill_scheduler_at=None,
        restart_scheduler_after=None,
        max_queue_requests=None,
        deadline_seconds=NO_DEADLINE_SECONDS,
    )
    figures, _ = simulate(calm, profile, "fcfs", promised * SATURATION, entries)
    if not figures.finished:
        raise CommandError(f"such workers serve none of these requests: {figures.errors}")
    return figures.steady_per_second


def fleet_profile(settings: SimulateSettings) -> Profile:
    """What a worker is, with the target for its steps. Raises `CommandError`."""
    target = settings.worker_itl_ms or GRACE * settings.itl_target_ms
    return replace(load_profile(settings.profile), target_itl_seconds=target / 1000)


def _read_trace(settings: SimulateSettings) -> list[Entry] | None:
    if settings.trace is None:
        return None
    try:
        return parse_trace(Path(settings.trace).read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"cannot read {settings.trace}: {error.strerror}") from error
    except (TraceError, UnicodeDecodeError) as error:
        raise CommandError(f"{settings.trace}: {error}") from error


def _say_cost(settings: SimulateSettings, cost: Cost, policy: str) -> None:
    each = 1e6 * cost.core_seconds / settings.requests
    print(
        f"{policy}: {cost.seconds:.1f} s of CPU, of which the scheduler's core {cost.core_seconds:.1f} s "
        f"({each:.0f} us a request); {cost.events} events",
        file=sys.stderr,
    )
