"""A cancel in any state frees its blocks before the next step, and a thousand of them leak none."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from fake_device import FakeDevice
from fake_model import VOCAB_SIZE, fake_engine
from overlap import overlapped_engine
from protocol_driver import GATEWAY, LEASE, Driver, joined, mock_engine

from sfllm.holdings import OpenChoice, digest
from sfllm.messages import ALL_CHOICES, WorkerCancel, WorkerFinished
from sfllm_worker.engine.planned import PlannedEngine
from sfllm_worker.ledger import RequestKey

CANCELS = 1000
STATES = (
    "queued",
    "prefill",
    "decode",
    "forks to come",
    "one choice",
    "one choice to come",
    "leading choice",
)
MAX_OPEN = 8


class Traffic:
    """Random grants, steps and cancels; `open` are the choices that should be held."""

    def __init__(self, engine: PlannedEngine, seed: int) -> None:
        self.driver: Driver = joined(engine)
        self.engine = engine
        self.random = random.Random(seed)
        self.open: dict[int, set[int]] = {}
        self.next_handle = 0
        self.ends_seen = 0
        self.cancelled: Counter[str] = Counter()

    def grant(self) -> None:
        handle, self.next_handle = self.next_handle, self.next_handle + 1
        shared = self.random.randrange(10)
        own = self.random.choices(range(1, VOCAB_SIZE), k=self.random.randint(1, 26))
        choices = tuple(range(self.random.choice((1, 1, 2, 3, 7))))
        self.driver.grant(handle, prompt=(*range(shared), *own), choices=choices, max_tokens=12)
        self.open[handle] = set(choices)

    def step(self) -> None:
        self.driver.step()
        ends = self.driver.messages(WorkerFinished)
        for end in ends[self.ends_seen :]:
            self.close(end.finished.handle, end.finished.choice)
        self.ends_seen = len(ends)

    def close(self, handle: int, choice: int) -> None:
        """A choice, or each of them, is open no more."""
        self.open[handle] -= self.open[handle] if choice == ALL_CHOICES else {choice}
        if not self.open[handle]:
            del self.open[handle]

    def cancel(self) -> None:
        handle = self.random.choice(list(self.open))
        choice = self.random.choice((ALL_CHOICES, self.random.choice(list(self.open[handle]))))
        self.cancelled[self.state_of(handle, choice)] += 1
        self.driver.tell(WorkerCancel(LEASE, GATEWAY, handle, 0, choice))
        self.close(handle, choice)

    def state_of(self, handle: int, choice: int) -> str:
        key = RequestKey(GATEWAY, handle)
        planner = self.engine.planner
        running = [sequence for sequence in planner.running if sequence.key == key]
        if choice != ALL_CHOICES:
            own = [s for s in (*running, *planner.waiting) if s.key == key and s.choice == choice]
            if not own:
                return "one choice to come"
            return "leading choice" if own[0].fork_choices else "one choice"
        if not running:
            return "queued"
        if any(sequence.fork_choices for sequence in running):
            return "forks to come"
        return "decode" if all(sequence.generated for sequence in running) else "prefill"

    def check(self) -> None:
        """The engine has the sequences of what is open and of nothing else; so does the ledger."""
        planner = self.engine.planner
        planner.check_integrity()
        found: dict[int, set[int]] = {}
        for sequence in (*planner.running, *planner.waiting):
            assert isinstance(sequence.key, RequestKey)
            found.setdefault(sequence.key.handle, set()).update((sequence.choice, *sequence.fork_choices))
        assert found == self.open
        held = (OpenChoice(GATEWAY, handle, 0, choice) for handle in found for choice in found[handle])
        assert self.driver.protocol.digest == digest(held)


def engine_of(kind: str) -> PlannedEngine:
    match kind:
        case "mock":
            return mock_engine(max_sequences=5, kv_tokens=80)
        case "model":
            return fake_engine()
        case _:
            return overlapped_engine(FakeDevice())


@pytest.mark.parametrize("kind", ["mock", "model", "overlap"])
def test_a_thousand_cancels_in_every_state_leave_every_block_free(kind: str) -> None:
    traffic = Traffic(engine_of(kind), seed=3)
    while traffic.cancelled.total() < CANCELS:
        while len(traffic.open) < MAX_OPEN:
            traffic.grant()
        for _ in range(traffic.random.choice((0, 0, 1, 1, 2, 4))):
            traffic.step()
        if traffic.open:
            traffic.cancel()
            traffic.check()
    assert set(traffic.cancelled) == set(STATES)
    while traffic.open:
        traffic.cancel()
    traffic.driver.run()
    assert traffic.driver.all_free()
    assert traffic.driver.protocol.held_requests == traffic.driver.protocol.digest == 0


@pytest.mark.parametrize("kind", ["mock", "model", "overlap"])
def test_what_is_not_cancelled_ends_and_leaves_every_block_free(kind: str) -> None:
    traffic = Traffic(engine_of(kind), seed=4)
    for _ in range(150):
        traffic.grant()
        traffic.step()
        if traffic.open and traffic.random.random() < 0.3:
            traffic.cancel()
        traffic.check()
    for _ in range(5000):
        if not traffic.open:
            break
        traffic.step()
    assert not traffic.open
    traffic.driver.run()
    assert traffic.driver.all_free()
