"""The checks of decisions find what they are for, and a replay of a simulated core decides the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from sfllm_simulation import scheduler as simulated
from sfllm_simulation.run import run
from sfllm_simulation.scenario import scenario

from sfllm_scheduler.core import routing
from sfllm_scheduler.core.core import SchedulerCore
from sfllm_scheduler.core.events import Action, Event
from sfllm_scheduler.core.flight import (
    Entry,
    FlightRecord,
    block,
    decision_code,
    digest,
    event_of,
    make_entry,
    opening,
)
from sfllm_scheduler.core.passing import Passing
from sfllm_scheduler.core.requests import Request
from sfllm_scheduler.core.state import PolicyValues

SEEDS = range(60)


def found() -> set[str]:
    """The kinds of the failures of some scenarios."""
    failures = [run(scenario(seed)).failure for seed in SEEDS]
    return {failure.kind for failure in failures if failure is not None}


def test_passing_without_a_bound_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def anybody(_passing: Passing, wanted: Request) -> Request:
        return wanted

    monkeypatch.setattr(Passing, "next", anybody)
    assert "overtaking" in found()


def test_a_worker_that_is_forgotten_when_it_has_room_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    grant_all = routing.grant_all
    calls = []

    def every_other_time(*arguments: object) -> None:
        calls.append(1)
        if len(calls) % 2:
            grant_all(*arguments)  # type: ignore[arg-type]  # whatever it takes

    monkeypatch.setattr(routing, "grant_all", every_other_time)
    assert "idle workers" in found()


class RecordedCore(SchedulerCore):
    """Remembers all that it was told and decided, of each core that lived."""

    records: list[list[bytes]]

    def __init__(self, policy: PolicyValues, epoch: int) -> None:
        super().__init__(policy, epoch)
        self.entries = [opening("test", epoch, policy)]
        self.records.append(self.entries)

    def handle(self, event: Event, now: float) -> list[Action]:
        actions = super().handle(event, now)
        self.entries.append(block(make_entry(event, now, actions)))
        return actions


@pytest.mark.parametrize("seed", range(12))
def test_a_replay_decides_the_same_whatever_happened(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    RecordedCore.records = []
    monkeypatch.setattr(simulated, "SchedulerCore", RecordedCore)
    assert run(scenario(seed)).failure is None
    decisions = 0
    for parts in RecordedCore.records:
        record = FlightRecord(parts)
        core = SchedulerCore(record.header.policy, record.header.epoch)
        for entry in record.entries():
            decisions += check_same(core, entry)
    assert decisions > 20


def check_same(core: SchedulerCore, entry: Entry) -> int:
    actions: Sequence[Action] = core.handle(event_of(entry), entry.time)
    assert bytes(map(decision_code, actions)) == entry.decisions
    assert digest(actions) == entry.digest
    return len(actions)
