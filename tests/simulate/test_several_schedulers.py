"""Several schedulers, one of which is killed: nothing is lost or done twice, and loads keep their bound."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from sfllm.rendezvous import LOAD_BOUND
from sfllm_cli.errors import CommandError
from sfllm_cli.simulate.command import run
from sfllm_cli.simulate.gateways import Ask
from sfllm_cli.simulate.profiles import PRESETS
from sfllm_cli.simulate.workload import Asked, conversation, of_chats, of_mix, own_names, poisson
from sfllm_cli.simulate.world import Fault, Setup, World
from sfllm_scheduler.core.state import PolicyValues

SCHEDULERS, WORKERS = 3, 12
KILLED_AT = 6.0
CHECK_SECONDS = 0.25
POLICY = PolicyValues(policy="auto", max_queue_requests=10**9, worker_wait_seconds=600.0)


def world_of(
    asked: Iterator[Asked], faults: tuple[Fault, ...] = (), killed_at: float | None = KILLED_AT
) -> World:
    """Three schedulers whose invariants, and those of all workers, are checked now and then."""
    setup = Setup(
        POLICY,
        PRESETS["cpu"],
        WORKERS,
        max_tokens=1024,
        faults=faults,
        schedulers=SCHEDULERS,
        kill_scheduler_at=killed_at,
    )
    world = World(setup, asked, lambda: 0.0)

    def look() -> None:
        for scheduler in world.schedulers:
            scheduler.core.check_integrity()
        for worker in world.workers:
            worker.engine.check_integrity()
        world.agenda.after(CHECK_SECONDS, look)

    world.agenda.after(CHECK_SECONDS, look)
    return world


def conversations(count: int, rate: float) -> Iterator[Asked]:
    return of_mix(conversation, poisson(rate, count, random.Random(1)), random.Random(2))


class Watch:
    """What ends, and every token that a worker gives to a client."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: list[Ask] = []
        self.tokens = 0
        end, step, first = world.collector.end, world.collector.step, world.gateways.first_token

        def watched_end(ask: Ask) -> None:
            self.ends.append(ask)
            end(ask)

        def watched_step(rows: int, seconds: float, steps: int) -> None:
            self.tokens += rows * steps
            step(rows, seconds, steps)

        def watched_first(gateway: int, handle: int, now: float) -> None:
            self.tokens += 1
            first(gateway, handle, now)

        monkeypatch.setattr(world.collector, "end", watched_end)
        monkeypatch.setattr(world.collector, "step", watched_step)
        monkeypatch.setattr(world.gateways, "first_token", watched_first)


def workers_at(world: World) -> list[int]:
    return [len(scheduler.core.state.workers) for scheduler in world.schedulers]


def test_when_a_scheduler_is_killed_every_request_ends_once_and_no_token_is_made_twice_or_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 300
    world = world_of(conversations(count, 25.0))
    watch = Watch(world, monkeypatch)
    figures = world.run()
    assert Counter(ask.handle for ask in watch.ends) == dict.fromkeys(range(1, count + 1), 1)
    assert not any(ask.error for ask in watch.ends)
    assert figures.attempts_lost == sum(ask.attempt for ask in watch.ends) > 0
    # Preempted sequences get a token with their second prefill that is not told from the others.
    assert figures.preemptions == 0
    assert watch.tokens == sum(ask.asked.output_tokens for ask in watch.ends)
    assert not any(world.gateways.open)
    assert [scheduler.alive for scheduler in world.schedulers].count(False) == 1


def test_the_workers_of_a_killed_scheduler_go_to_those_that_are_left() -> None:
    world = world_of(conversations(200, 20.0))
    before: list[int] = []
    world.agenda.at(KILLED_AT - 0.1, lambda: before.extend(workers_at(world)))
    world.run()
    assert min(before) > 0
    assert sum(before) == WORKERS
    after = [number for number, each in zip(workers_at(world), world.schedulers, strict=True) if each.alive]
    assert sum(after) == WORKERS


def test_workers_that_fail_and_drain_around_the_kill_lose_no_request() -> None:
    times = (KILLED_AT - 0.5, KILLED_AT + 0.01, KILLED_AT + 0.5, KILLED_AT + 1.01)
    faults = tuple(
        Fault(at, ("fail", "drain")[(number + turn) % 2], (number + 3 * turn) % WORKERS)
        for turn, at in enumerate(times)
        for number in range(0, WORKERS, 4)
    )
    count = 300
    world = world_of(conversations(count, 25.0), faults)
    figures = world.run()
    assert figures.finished == count
    assert not any(world.gateways.open)
    assert not any(map(any, world.gateways.loads))


def test_a_run_with_a_kill_repeats_itself() -> None:
    def figures() -> object:
        return world_of(of_chats(15.0, 200, random.Random(0))).run()

    assert figures() == figures()


def test_no_scheduler_gets_more_than_its_bounded_share_of_prompts_that_all_begin_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count, prompt = 200, 300
    alike = (
        Asked(at, prompt, 100, own_names(7, prompt + 100)) for at in poisson(60.0, count, random.Random(0))
    )
    world = world_of(alike, killed_at=3.0)
    chosen: Counter[int] = Counter()
    ask = world.gateways.ask

    def watched(asked: Asked) -> None:
        before = [list(loads) for loads in world.gateways.loads]
        ask(asked)
        for old, loads in zip(before, world.gateways.loads, strict=True):
            for number, load in enumerate(loads):
                if load > old[number]:
                    workers = workers_at(world)
                    total = sum(workers[known] for known in world.gateways.known)
                    assert load <= math.ceil(LOAD_BOUND * sum(loads) * workers[number] / total)
                    chosen[number] += 1

    monkeypatch.setattr(world.gateways, "ask", watched)
    world.run()
    assert sum(chosen.values()) == count
    assert len(chosen) == SCHEDULERS


def test_the_only_scheduler_cannot_be_killed() -> None:
    with pytest.raises(CommandError, match="--schedulers 2"):
        run(["--kill-scheduler-at", "5"])
