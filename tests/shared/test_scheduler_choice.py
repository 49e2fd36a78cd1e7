"""The choice of a worker's scheduler: spread, minimal movement, the next one in time, and no flapping."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sfllm.rendezvous import ranked
from sfllm.scheduler_choice import (
    LONGEST_PROBE_SECONDS,
    LONGEST_STEADY_SECONDS,
    MISSED_PROBES,
    PROBE_SECONDS,
    STEADY_SECONDS,
    WELCOME_SECONDS,
    SchedulerChoice,
)

ADDRESSES = ["tcp://a:1", "tcp://b:1", "tcp://c:1"]
LONGEST_FIRST_PATIENCE = 3 * STEADY_SECONDS


def test_workers_spread_evenly() -> None:
    counts = Counter(ranked(f"w-{number}", ADDRESSES)[0] for number in range(3000))
    assert all(900 < counts[index] < 1100 for index in range(3))


@given(worker=st.text(), gone=st.integers(0, 2))
def test_when_a_scheduler_goes_the_order_of_the_others_stays(worker: str, gone: int) -> None:
    order = [ADDRESSES[index] for index in ranked(worker, ADDRESSES)]
    left = [address for index, address in enumerate(ADDRESSES) if index != gone]
    assert [left[index] for index in ranked(worker, left)] == [
        each for each in order if each != ADDRESSES[gone]
    ]


@given(worker=st.text(), shuffled=st.permutations(ADDRESSES))
def test_the_order_of_the_addresses_does_not_matter(worker: str, shuffled: list[str]) -> None:
    assert [shuffled[i] for i in ranked(worker, shuffled)] == [
        ADDRESSES[i] for i in ranked(worker, ADDRESSES)
    ]


class World:
    """A worker and its schedulers, seen a tenth of a second at a time."""

    def __init__(self, worker: str = "w-1") -> None:
        self.now = 0.0
        self.choice = SchedulerChoice(worker, ADDRESSES, 0.0)
        self.order = ranked(worker, ADDRESSES)
        self.up = {0: 1, 1: 1, 2: 1}
        """Epochs of those that are there."""
        self.moves: list[float] = []
        self.probes: Counter[int] = Counter()

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.1
            choice = self.choice
            choice.see(choice.current in self.up, self.now)
            if (better := choice.better()) is not None and choice.current in self.up:
                choice.take(better, self.now)
                self.moves.append(self.now)
            for index in choice.to_probe(self.now):
                self.probes[index] += 1
                if index in self.up:
                    choice.answered(index, self.up[index], self.now)

    def stop(self, index: int) -> None:
        self.epoch = self.up.pop(index) + 1

    def start(self, index: int) -> None:
        self.up[index] = self.epoch


def test_it_goes_to_the_first_in_its_order_and_stays() -> None:
    world = World()
    world.run(1000)
    assert world.choice.current == world.order[0]
    assert world.moves == []


def test_a_scheduler_that_gives_no_welcome_is_passed_over_for_the_best_that_is_there() -> None:
    world = World()
    world.stop(world.order[1])
    world.stop(world.order[0])
    world.run(WELCOME_SECONDS - 0.2)
    assert world.choice.current == world.order[0]
    world.run(0.5)
    assert world.choice.current == world.order[2]


def test_while_none_is_there_each_is_tried_in_turn() -> None:
    world = World()
    for index in range(3):
        world.stop(index)
    tried = []
    for _ in range(4):
        tried.append(world.choice.current)
        world.run(WELCOME_SECONDS)
    assert tried == [*world.order, world.order[0]]


def test_it_moves_back_once_the_better_one_has_been_there_for_a_while() -> None:
    world = World()
    world.run(10)
    best = world.order[0]
    world.stop(best)
    world.run(LONGEST_PROBE_SECONDS)
    assert world.choice.current == world.order[1]
    world.start(best)
    world.run(STEADY_SECONDS)
    assert world.choice.current == world.order[1]
    world.run(LONGEST_PROBE_SECONDS + 2 * LONGEST_FIRST_PATIENCE + 2)
    assert world.choice.current == best
    assert len(world.moves) == 1


def test_a_restart_in_between_begins_the_wait_anew() -> None:
    world = World()
    world.stop(world.order[0])
    world.run(WELCOME_SECONDS + 1)
    for _ in range(40):
        world.start(world.order[0])
        world.run(STEADY_SECONDS - 0.5)
        world.stop(world.order[0])
    assert world.choice.current == world.order[1]
    assert world.moves == []


@given(up=st.floats(1, 60), down=st.floats(5, 60))
def test_a_scheduler_that_comes_and_goes_is_followed_ever_more_rarely(up: float, down: float) -> None:
    world = World()
    best = world.order[0]
    while world.now < 3600:
        world.run(up)
        world.stop(best)
        world.run(down)
        world.start(best)
    doublings = 8  # from the shortest patience to the longest
    assert len(world.moves) <= doublings + 3600 / LONGEST_STEADY_SECONDS


def test_a_scheduler_that_is_down_for_hours_is_not_flooded_with_questions() -> None:
    world = World()
    gone = world.order[2]
    world.stop(gone)
    world.run(3600)
    assert MISSED_PROBES < world.probes[gone] < 3600 / LONGEST_PROBE_SECONDS + 10
    assert world.probes[world.order[1]] >= 3600 / PROBE_SECONDS * 0.8


def test_workers_do_not_all_move_at_once() -> None:
    moves = set()
    for number in range(50):
        world = World(f"w-{number}")
        world.stop(world.order[0])
        world.run(WELCOME_SECONDS + 1)
        world.start(world.order[0])
        world.run(60)
        moves.add(round(world.moves[0]))
    assert len(moves) >= 5


def test_a_worker_with_one_scheduler_asks_nobody_and_never_moves() -> None:
    choice = SchedulerChoice("w", ["only"], 0.0)
    for second in range(100):
        assert choice.to_probe(float(second)) == []
        choice.see(second % 20 > 10, float(second))
        assert choice.better() is None
        assert choice.current == 0
