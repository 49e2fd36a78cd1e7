"""A request that crashes every worker is found, and nobody else pays for it."""

from __future__ import annotations

import pytest
from crash_world import CrashWorld, Stream
from hypothesis import given, settings
from hypothesis import strategies as st

from sfllm.errors import ErrorCode

MOST_STEPS = 20_000


def run_to_the_end(world: CrashWorld) -> None:
    while world.open:
        assert world.steps < MOST_STEPS, f"{len(world.open)} streams never end"
        world.step()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("poison_at", [0, 30])
def test_a_poisonous_request_among_forty_others_is_found_and_they_finish(
    workers: int, poison_at: int
) -> None:
    world = CrashWorld(workers)
    streams = [world.submit(length=60, poison_at=poison_at if n == 17 else None) for n in range(41)]
    run_to_the_end(world)
    assert [stream.handle for stream in streams if stream.end != "length"] == [18]
    assert streams[17].end == ErrorCode.ENGINE_FAILURE
    assert world.crashes <= 8, "the first, five halvings of 41, and two alone"
    assert world.steps * 0.05 < 60, "nobody waits for long"


def test_requests_that_come_during_the_search_are_served_too() -> None:
    world = CrashWorld(workers=2)
    for number in range(20):
        world.submit(length=200, poison_at=10 if number == 3 else None)
    late: list[Stream] = []
    while world.open:
        assert world.steps < MOST_STEPS
        if world.steps % 10 == 0 and len(late) < 60:
            late.append(world.submit(length=20))
        world.step()
    assert all(stream.end == "length" for stream in late)
    assert [stream.end for stream in world.streams.values()].count(ErrorCode.ENGINE_FAILURE) == 1


def test_two_poisonous_requests_are_both_found() -> None:
    world = CrashWorld(workers=2)
    streams = [world.submit(length=50, poison_at=12 if n in (4, 9) else None) for n in range(16)]
    run_to_the_end(world)
    assert [n for n, stream in enumerate(streams) if stream.end != "length"] == [4, 9]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_else_is_killed_only_who_was_alone_at_two_crashes_is_quarantined(
    data: st.DataObject,
) -> None:
    innocents = data.draw(st.integers(0, 30))
    world = CrashWorld(
        workers=data.draw(st.integers(1, 4)),
        slots=data.draw(st.integers(4, 40)),
        restart_steps=data.draw(st.integers(1, 60)),
    )
    poison_index = data.draw(st.integers(0, innocents))
    poison_at = data.draw(st.integers(0, 39))
    lengths = st.integers(1, 120)
    for number in range(innocents + 1):
        if number == poison_index:
            poison = world.submit(length=40, poison_at=poison_at)
        else:
            world.submit(length=data.draw(lengths))
    kills = data.draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3)), max_size=8))
    while world.open:
        assert world.steps < MOST_STEPS, f"{len(world.open)} streams never end"
        for step, number in kills:
            if step == world.steps and number < len(world.workers):
                world.kill(list(world.workers.values())[number])
        world.step()
    assert poison.end == ErrorCode.ENGINE_FAILURE
    for stream in world.streams.values():
        if stream.end != "length":
            assert stream.end == ErrorCode.ENGINE_FAILURE
            assert stream.really_alone >= 2, f"stream {stream.handle} was not alone at two crashes"
