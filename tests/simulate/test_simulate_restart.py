"""Schedulers that come back, and the choice of gateways beside the real one."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from sfllm.messages import GatewayWelcome, Models, ModelState, Sampling, Submit
from sfllm.prefixes import CHUNK_TOKENS, prefix_names
from sfllm_cli.simulate.command import run
from sfllm_cli.simulate.placing import Placing
from sfllm_cli.simulate.profiles import PRESETS
from sfllm_cli.simulate.worker import CARD, MOVE_SECONDS
from sfllm_cli.simulate.workload import Asked, of_mix, own_names, poisson, uniform
from sfllm_cli.simulate.world import Fault, Setup, World
from sfllm_gateway.stream import Outgoing, Request
from sfllm_gateway.tables import SchedulerTables
from sfllm_scheduler.core.state import PolicyValues

SCHEDULERS, WORKERS = 3, 12
KILLED_AT, DOWN_SECONDS = 4.0, 5.0
POLICY = PolicyValues(policy="auto", max_queue_requests=10**9, worker_wait_seconds=600.0)
ADDRESSES = [f"scheduler-{index}" for index in range(SCHEDULERS)]


def world_of(asked: Iterator[Asked]) -> World:
    setup = Setup(
        POLICY,
        PRESETS["cpu"],
        WORKERS,
        max_tokens=1024,
        schedulers=SCHEDULERS,
        kill_scheduler_at=KILLED_AT,
        restart_scheduler_after=DOWN_SECONDS,
    )
    return World(setup, asked, lambda: 0.0)


def workers_at(world: World) -> list[int]:
    return [len(scheduler.core.state.workers) for scheduler in world.schedulers]


def test_workers_move_back_by_drain_and_lose_nothing_on_the_way() -> None:
    count = 1000
    world = world_of(of_mix(uniform, poisson(15.0, count, random.Random(1)), random.Random(2)))
    seen: dict[float, list[int]] = {}
    lost: dict[float, int] = {}

    def look() -> None:
        for scheduler in world.schedulers:
            scheduler.core.check_integrity()
        seen[world.agenda.now] = workers_at(world)
        lost[world.agenda.now] = world.gateways.interrupted

    moved_at = KILLED_AT + DOWN_SECONDS + 50.0
    before, down, after = KILLED_AT - 0.5, KILLED_AT + DOWN_SECONDS - 0.1, moved_at
    for at in (before, down, down + 0.2, after):
        world.agenda.at(at, look)
    figures = world.run()
    assert figures.finished == count
    assert seen[before] == seen[after]
    assert min(seen[before]) > 0
    assert sum(seen[down][1:]) == WORKERS
    # They have all left the killed one, and wait for a while before they follow it back, each by itself.
    assert seen[down + 0.2][0] == 0
    assert lost[down] > 0
    assert [scheduler.alive for scheduler in world.schedulers] == [True] * SCHEDULERS
    assert world.schedulers[0].epoch == 2
    # What has begun is finished before a move.
    assert lost[after] == lost[down]
    assert not any(map(any, world.gateways.loads))


def test_a_move_does_not_wait_for_ever_for_what_has_begun() -> None:
    """Answers that take longer than a drain may go on elsewhere, with the tokens so far."""
    prompt, tokens, count = 100, 7000, 3 * WORKERS
    at = KILLED_AT + DOWN_SECONDS + 2.0  # when those that lost their scheduler serve others
    asked = [Asked(at, prompt, tokens, own_names(number, prompt + tokens)) for number in range(count)]
    world = world_of(iter(asked))
    figures = world.run()
    assert figures.finished == count
    assert figures.attempts_lost > 0
    # Nobody computes an answer twice, though workers have twice their share for a while.
    rows = 2 * count // WORKERS
    step = PRESETS["cpu"].curve.seconds(0, rows, rows * (prompt + tokens))
    assert MOVE_SECONDS < figures.end_to_end.p99 < tokens * step


def test_what_several_schedulers_made_is_written_and_repeats_itself(tmp_path: Path) -> None:
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    fleet = ["--profile=cpu", "--workers=6", "--requests=150", "--rate=15", "--schedulers=3"]
    for path in files:
        assert run([*fleet, "--kill-scheduler-at=3", "--policy=fcfs,auto", f"--json={path}"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    document = json.loads(files[0].read_text())
    assert document["settings"]["schedulers"] == 3
    assert all(each["finished"] == 150 and each["attempts_lost"] > 0 for each in document["runs"])


WORKERS_AT = st.lists(st.none() | st.integers(0, 4), min_size=SCHEDULERS, max_size=SCHEDULERS)
ASKED = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3 * CHUNK_TOKENS)), min_size=1, max_size=60)


def submitted(tables: SchedulerTables) -> int:
    """To which scheduler the one request went that was opened last."""
    places = [
        index
        for index in range(SCHEDULERS)
        for sent in tables.take_outgoing(index)
        if isinstance(sent, Outgoing) and isinstance(sent.message, Submit)
    ]
    (place,) = places
    return place


@settings(max_examples=60, deadline=None, derandomize=True)
@given(workers=WORKERS_AT, asked=ASKED, ends=st.randoms(use_true_random=False))
def test_a_modelled_gateway_chooses_as_the_real_one(
    workers: list[int | None], asked: list[tuple[int, int]], ends: random.Random
) -> None:
    tables = SchedulerTables(b"g", 1, ADDRESSES, 4, lambda _states: None)
    placing = Placing(1, ADDRESSES)
    tables.tick(0.0)
    for index, count in enumerate(workers):
        tables.handle(index, GatewayWelcome(5, 2.0, 6.0), (), 0.0)
        models = () if count is None else (ModelState(CARD, count),)
        tables.handle(index, Models(models), (), 0.0)
        tables.take_outgoing(index)
        placing.hear(index, count)
    opened = []
    for number, (family, tokens) in enumerate(asked):
        prompt = array("I", [family * 1000 + position for position in range(tokens)])
        request = Request(str(number), CARD.name, prompt, 1, Sampling(max_tokens=1, seed=1))
        stream = tables.open(request, 60.0, 0.0, lambda: None)
        place = submitted(tables)
        assert placing.choose_any(0, prefix_names(memoryview(prompt), ""), str(number)) == place
        placing.put(0, place)
        opened.append((stream, place))
        if ends.random() < 0.4:
            stream, place = opened.pop(ends.randrange(len(opened)))
            tables.release(stream, "gone", 0.0)
            placing.take(0, place)
            for index in range(SCHEDULERS):
                tables.take_outgoing(index)


def test_what_found_no_other_place_goes_on_at_the_scheduler_that_comes_back() -> None:
    """All workers fail before the kill and are replaced after it: meanwhile no other scheduler has any."""
    workers, count = 6, 40
    setup = Setup(
        POLICY,
        PRESETS["cpu"],
        workers,
        faults=tuple(Fault(KILLED_AT - 0.2, "fail", number) for number in range(workers)),
        schedulers=SCHEDULERS,
        kill_scheduler_at=KILLED_AT,
        restart_scheduler_after=3.0,
    )
    asked = of_mix(uniform, poisson(20.0, count, random.Random(1)), random.Random(2))
    world = World(setup, asked, lambda: 0.0)
    figures = world.run()
    assert figures.finished == count
    assert figures.attempts_lost > 0
    assert not any(map(any, world.gateways.loads))
