"""Whole runs: queueing theory where it has an answer, nothing lost under faults, invariants all along."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from sfllm_cli.simulate.figures import Figures
from sfllm_cli.simulate.profiles import PRESETS, Profile
from sfllm_cli.simulate.workload import (
    Asked,
    conversation,
    of_chats,
    of_mix,
    own_names,
    poisson,
    shared_out,
    two_sizes,
)
from sfllm_cli.simulate.world import Fault, Setup, World
from sfllm_scheduler.core.cohorts import POLICIES
from sfllm_scheduler.core.state import PolicyValues

NO_BOUND = 10**9
CHECK_SECONDS = 0.5


def policy(name: str = "auto", **values: object) -> PolicyValues:
    own = PolicyValues(policy=name, max_queue_requests=NO_BOUND, worker_wait_seconds=600.0)
    return replace(own, **values)


def simulated(setup: Setup, asked: Iterator[Asked], *, check: bool = False) -> tuple[World, Figures]:
    """Run it; with `check` the invariants of the scheduler and of every worker are checked now and then."""
    world = World(setup, asked, lambda: 0.0)

    def look() -> None:
        for scheduler in world.schedulers:
            scheduler.core.check_integrity()
        for worker in world.workers:
            worker.engine.check_integrity()
        world.agenda.after(CHECK_SECONDS, look)

    if check:
        world.agenda.after(CHECK_SECONDS, look)
    return world, world.run()


def alike(count: int, prompt: int, output: int, times: Iterator[float]) -> Iterator[Asked]:
    for number, at in zip(range(count), times, strict=True):
        yield Asked(at, prompt, output, own_names(number, prompt + output))


SLOW_LINK = 0.003


@pytest.mark.parametrize("prompt", [1, 300, 512, 1300])
def test_a_lone_request_takes_what_the_curve_says(prompt: int) -> None:
    profile = PRESETS["cpu"]
    outputs = 40
    setup = Setup(policy(), profile, workers=1, link_seconds=SLOW_LINK)
    _, figures = simulated(setup, alike(1, prompt, outputs, iter([0.01])))
    steps = -(-prompt // profile.step_tokens)
    prefill = steps * profile.base_seconds + prompt * profile.per_prefill_token
    # Gateway, scheduler, worker; and the way back.
    assert figures.ttft.p50 == pytest.approx(prefill + 4 * SLOW_LINK, abs=1e-9)
    contexts = sum(prompt + step for step in range(outputs - 1))
    decode = (outputs - 1) * (profile.base_seconds + profile.per_decode_row)
    decode += contexts * profile.per_context_token
    # The scheduler may take the end in with what came before it, up to one link's delay early.
    assert figures.end_to_end.p50 == pytest.approx(prefill + decode + 3.5 * SLOW_LINK, abs=SLOW_LINK)


def test_one_slot_is_a_queue_with_one_server() -> None:
    """M/D/1: half the load over what the load leaves, times the service, is the mean wait."""
    profile = Profile(
        source="a test",
        base_seconds=0.1,
        per_prefill_token=0.0,
        per_decode_row=0.0,
        per_context_token=0.0,
        slots=1,
        kv_tokens=64_000,
        step_tokens=512,
    )
    service, load, count = 0.1 * 5, 0.6, 5000
    setup = Setup(policy("fcfs"), profile, workers=1, link_seconds=1e-6)
    waits = []
    times = poisson(load / service, count, random.Random(3))
    world = World(setup, alike(count, 64, 5, times), lambda: 0.0)
    end = world.collector.end
    world.collector.end = lambda ask: (waits.append(ask.ended - ask.asked.at - service), end(ask))[1]  # type: ignore[method-assign,assignment]  # to see every wait
    world.run()
    assert len(waits) == count
    assert sum(waits) / count == pytest.approx(load * service / (2 * (1 - load)), rel=0.08)


def test_as_many_slots_as_requests_wait_for_nothing() -> None:
    setup = Setup(policy("fcfs"), PRESETS["gpu"], workers=4)
    _, figures = simulated(setup, alike(200, 32, 20, poisson(2.0, 200, random.Random(0))))
    lone = PRESETS["gpu"].curve.seconds(32, 0, 0)
    assert figures.ttft.p99 < 2 * lone + 0.02


@pytest.mark.parametrize("name", POLICIES)
def test_every_request_ends_once_whatever_happens_to_workers(name: str) -> None:
    faults = (
        Fault(3.0, "slow", 0, factor=5.0),
        Fault(6.0, "fail", 1),
        Fault(8.0, "drain", 2),
        Fault(12.0, "fail", 0),
        Fault(14.0, "fail", 3),
    )
    setup = Setup(
        policy(name),
        PRESETS["cpu"],
        workers=4,
        max_tokens=1024,
        faults=faults,
        joining=2,
        joining_seconds=4.0,
    )
    count = 400
    asked = of_mix(conversation, poisson(20.0, count, random.Random(1)), random.Random(2))
    world, figures = simulated(setup, asked, check=True)
    assert figures.requests == count
    assert figures.finished == count
    assert figures.attempts_lost > 0
    assert not any(world.gateways.open)
    for scheduler in world.schedulers:
        scheduler.core.check_integrity()


def test_a_worker_that_died_and_is_replaced_costs_attempts_but_no_tokens() -> None:
    profile = PRESETS["cpu"]
    prompt, outputs = 200, 200
    setup = Setup(policy(), profile, workers=1, faults=(Fault(2.0, "fail", 0),))
    _, figures = simulated(setup, alike(1, prompt, outputs, iter([0.0])), check=True)
    assert (figures.finished, figures.attempts_lost) == (1, 1)
    whole = profile.curve.seconds(prompt, 0, 0)
    whole += sum(profile.curve.seconds(0, 1, prompt + step) for step in range(outputs - 1))
    # What had come in the first second is not generated again: only computed, with the prompt.
    assert figures.end_to_end.p50 < whole + 5.0 + 0.5
    assert figures.ttft.p50 < 0.5


def test_a_worker_that_drains_gives_back_what_it_has_not_begun() -> None:
    setup = Setup(policy(), PRESETS["cpu"], workers=2, faults=(Fault(1.05, "drain", 0),))
    world, figures = simulated(setup, alike(12, 1500, 30, iter([0.0] * 12)), check=True)
    assert figures.finished == 12
    assert figures.attempts_lost > 0
    assert world.gateways.interrupted == figures.attempts_lost


def test_requests_past_their_deadline_end_with_an_error() -> None:
    setup = Setup(policy(), PRESETS["cpu"], workers=1)
    asked = [each._replace(deadline=5.0) for each in alike(60, 1000, 100, iter([0.0] * 60))]
    _, figures = simulated(setup, iter(asked), check=True)
    assert figures.errors["deadline_exceeded"] > 0
    assert figures.finished + sum(figures.errors.values()) == 60
    assert figures.end_to_end.p99 <= 5.1


def test_a_full_queue_refuses() -> None:
    setup = Setup(policy(max_queue_requests=5), PRESETS["cpu"], workers=1)
    _, figures = simulated(setup, alike(100, 1000, 50, iter([0.0] * 100)))
    assert figures.errors["queue_full"] > 0
    assert figures.requests == 100


def test_first_come_first_served_overtakes_nobody() -> None:
    setup = Setup(policy("fcfs"), PRESETS["cpu"], workers=3)
    asked = of_mix(two_sizes, poisson(50.0, 300, random.Random(0)), random.Random(1))
    assert simulated(setup, asked)[1].overtakes_most == 0


def test_nobody_is_overtaken_more_than_the_bound_for_each_worker() -> None:
    def most(bound: int) -> int:
        setup = Setup(policy("length", max_overtakes=bound), PRESETS["cpu"], workers=3)
        asked = of_mix(two_sizes, poisson(50.0, 600, random.Random(0)), random.Random(1))
        return simulated(setup, asked)[1].overtakes_most

    assert 0 < most(10) <= 30
    assert most(1000) > 30


def test_prefix_policies_find_more_of_chats_in_the_caches() -> None:
    def hits(name: str) -> float:
        setup = Setup(policy(name), PRESETS["gpu"], workers=8)
        return simulated(setup, of_chats(40.0, 1500, random.Random(0)))[1].prefix_hit_share

    assert hits("prefix") > hits("fcfs") + 0.05
    assert hits("auto") > hits("fcfs") + 0.05


def test_auto_serves_a_modest_tenant_beside_a_greedy_one() -> None:
    def fair(name: str) -> float:
        setup = Setup(policy(name), PRESETS["cpu"], workers=2)
        times = poisson(30.0, 900, random.Random(0))
        asked = shared_out(of_mix(conversation, times, random.Random(1)), (9.0, 1.0), random.Random(2))
        return simulated(setup, asked)[1].fairness

    assert fair("auto") > fair("fcfs")
    assert fair("auto") > 0.9


def test_a_small_cache_preempts_and_still_finishes() -> None:
    profile = replace(PRESETS["cpu"], kv_tokens=4096)
    setup = Setup(policy("fcfs"), profile, workers=1, max_tokens=None)
    # The expectation of outputs is learned from short ones; then long ones come.
    short = alike(60, 100, 8, poisson(10.0, 60, random.Random(0)))
    long = (
        each._replace(at=each.at + 10.0) for each in alike(40, 100, 400, poisson(10.0, 40, random.Random(1)))
    )
    world, figures = simulated(setup, iter([*short, *long]), check=True)
    assert figures.finished == 100
    assert all(worker.engine.blocks.own == 0 for worker in world.workers)
