"""The streams of a gateway at several schedulers: where they go, and that moving loses nothing."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_model import BEAT_SECONDS, LEASE_SECONDS, LENGTH, SchedulerModel, Sent, true_tokens

from sfllm import wire
from sfllm.errors import ServiceError
from sfllm.messages import (
    Admitted,
    Asset,
    Cancel,
    GatewayWelcome,
    Interrupted,
    Message,
    ModelCard,
    Models,
    ModelState,
    Sampling,
    SchedulerBeat,
    Submit,
    Tokens,
)
from sfllm.token_batch import TokenBatch
from sfllm_gateway.stream import Request
from sfllm_gateway.streams import ClearOutbox, OpenStream
from sfllm_gateway.tables import SchedulerTables

IDENTITY = b"g-test"
FAR = 1e9
ADDRESSES = ("one", "two", "three")
CARD = ModelCard("m", (), "m", 0, 128, 259, (256,), ())


def request(number: int = 1, n: int = 1) -> Request:
    return Request(f"r-{number}", "m", array("I", [1, 2]), n, Sampling(max_tokens=LENGTH, seed=1))


class World:
    """Tables and three schedulers, between which messages are late, doubled, or lost with a scheduler."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.now = 0.0
        self.models: tuple[ModelState, ...] = ()
        self.tables = SchedulerTables(IDENTITY, 77, ADDRESSES, 10**6, self.hear_models)
        self.schedulers = [SchedulerModel(IDENTITY) for _ in ADDRESSES]
        self.workers = [2, 1, 1]
        self.down = [False] * 3
        self.to_schedulers: list[list[Sent]] = [[], [], []]
        self.to_gateway: list[list[Sent]] = [[], [], []]
        self.opened: list[OpenStream] = []
        self.number = 0
        self.settle()

    def hear_models(self, states: object) -> None:
        assert isinstance(states, tuple)
        self.models = states

    def collect(self) -> None:
        for index, scheduler in enumerate(self.schedulers):
            for item in self.tables.take_outgoing(index):
                if not isinstance(item, ClearOutbox):
                    self.to_schedulers[index].append((item.message, item.arrays))
            self.to_gateway[index] += scheduler.outgoing
            scheduler.outgoing = []
            if self.down[index]:
                self.to_schedulers[index].clear()
                self.to_gateway[index].clear()

    def deliver(self, index: int) -> None:
        """One message each way."""
        if self.to_schedulers[index]:
            self.schedulers[index].take(*self.to_schedulers[index].pop(0))
        if self.to_gateway[index]:
            message, arrays = self.to_gateway[index].pop(0)
            self.tables.handle(index, message, arrays, self.now)
        self.collect()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for scheduler, workers in zip(self.schedulers, self.workers, strict=True):
            scheduler.beat()
            if scheduler.known:
                scheduler.outgoing.append((Models((ModelState(CARD, workers),)), ()))
        self.tables.tick(self.now)
        self.collect()

    def settle(self) -> None:
        for _ in range(20):
            self.pass_time(0.5)
            for index in range(3):
                while self.to_schedulers[index] or self.to_gateway[index]:
                    self.deliver(index)

    def live(self, index: int) -> list[tuple[int, int]]:
        return [
            (handle, choice) for handle, live in self.schedulers[index].live.items() for choice in live.counts
        ]

    def step(self) -> None:
        chance, index = self.chance, self.chance.randrange(3)
        kind = chance.choices(("traffic", "open", "leave", "fault", "workers", "lost"), (40, 6, 1, 1, 1, 2))[
            0
        ]
        match kind:
            case "traffic":
                self.traffic()
            case "open" if len(self.opened) < 6 and self.tables.connected:
                self.number += 1
                asked = request(self.number, chance.randint(1, 2))
                self.opened.append(self.tables.open(asked, FAR, self.now, lambda: None))
            case "leave" if self.opened:
                opened = self.opened.pop(chance.randrange(len(self.opened)))
                self.tables.release(opened, "left", self.now)
            case "fault":
                self.down[index] = not self.down[index]
                if chance.random() < 0.5:
                    self.schedulers[index].restart()
            case "workers":
                self.workers[index] = chance.randint(0, 2)
            case "lost":
                for handle in list(self.schedulers[index].live):
                    self.schedulers[index].interrupt(handle)
        self.collect()
        self.check()

    def traffic(self) -> None:
        for index in range(3):
            if running := self.live(index):
                handle, choice = self.chance.choice(running)
                self.schedulers[index].make_tokens(handle, choice, self.chance.randint(1, 3))
            for _ in range(self.chance.randint(0, 6)):
                self.deliver(index)
        self.pass_time(self.chance.choice((0.1, 0.5, 2.0)))

    def check(self) -> None:
        for opened in self.opened:
            for choice, journal in enumerate(opened.stream.choices):
                expected = true_tokens(opened.stream.handle, choice)
                assert list(journal.ids) == expected[: len(journal.ids)]
                assert journal.finish_reason is None or len(journal.ids) == len(expected)

    def finish(self) -> None:
        self.down = [False] * 3
        self.workers = [1, 0, 1]
        for _ in range(6):
            self.settle()
            for index in range(3):
                for handle, choice in self.live(index):
                    self.schedulers[index].make_tokens(handle, choice, LENGTH)
        self.settle()
        self.check()
        for opened in self.opened:
            assert opened.stream.ended
            assert opened.stream.error is None
            self.tables.release(opened, "read", self.now)
        self.settle()
        assert not any(scheduler.live for scheduler in self.schedulers)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 150))
def test_whichever_schedulers_come_and_go_tokens_are_true_and_every_request_ends(
    seed: int, steps: int
) -> None:
    world = World(random.Random(seed))
    for _ in range(steps):
        world.step()
    world.finish()


class Wired:
    """Tables of two schedulers that have welcomed the gateway at time 0 and serve the model."""

    def __init__(self, workers: tuple[int, int] = (1, 1)) -> None:
        self.models: tuple[ModelState, ...] = ()
        self.notes: list[str] = []
        self.tables = SchedulerTables(
            IDENTITY, 77, ADDRESSES[:2], 4, self.hear_models, lambda event, _fields: self.notes.append(event)
        )
        self.tables.tick(0.0)
        for index, count in enumerate(workers):
            self.say(index, GatewayWelcome(5 + index, BEAT_SECONDS, LEASE_SECONDS))
            self.say(index, Models((ModelState(CARD, count),)))
            self.sent(index)

    def hear_models(self, states: object) -> None:
        assert isinstance(states, tuple)
        self.models = states

    def say(self, index: int, message: Message, *arrays: wire.Array, at: float = 0.0) -> None:
        self.tables.handle(index, message, arrays, at)

    def open(self, number: int = 1) -> OpenStream:
        return self.tables.open(request(number), FAR, 0.0, lambda: None)

    def sent(self, index: int) -> list[Message]:
        outgoing = self.tables.take_outgoing(index)
        return [item.message for item in outgoing if not isinstance(item, ClearOutbox)]

    def open_at(self, index: int) -> OpenStream:
        """A stream that went to that scheduler."""
        for number in range(100):
            opened = self.open(number)
            if any(isinstance(message, Submit) for message in self.sent(index)):
                return opened
            self.tables.release(opened, "elsewhere", 0.0)
            self.sent(1 - index)
        raise AssertionError("no request went there")

    def submits(self, index: int) -> list[Submit]:
        return [message for message in self.sent(index) if isinstance(message, Submit)]


def test_workers_of_all_schedulers_are_added_up_and_those_of_a_lost_one_taken_off() -> None:
    wired = Wired((2, 3))
    assert wired.models == (ModelState(CARD, 5),)
    wired.tables.lose(0, "gone", 1.0)
    assert wired.models == (ModelState(CARD, 3),)
    wired.tables.lose(1, "gone", 1.0)
    assert wired.models == (ModelState(CARD, 3),)  # what was known is worth waiting for
    with pytest.raises(ServiceError, match="cannot be reached"):
        wired.open()


@pytest.mark.parametrize("lost", [0, 1])
def test_streams_of_a_lost_scheduler_go_on_elsewhere_at_once_with_the_tokens_so_far(lost: int) -> None:
    wired = Wired()
    opened = wired.open_at(lost)
    handle = opened.stream.handle
    batch = TokenBatch()
    batch.append(handle, 0, 0, 0, true_tokens(handle, 0)[:3])
    wired.say(lost, Tokens(), *batch.arrays(), at=0.5)
    wired.tables.lose(lost, "gone", 1.0)
    [submit] = wired.submits(1 - lost)
    assert (submit.handle, submit.attempt, submit.generated_counts) == (handle, 1, (3,))
    wired.say(lost, GatewayWelcome(5 + lost, BEAT_SECONDS, LEASE_SECONDS), at=2.0)
    assert wired.submits(lost) == []  # it is where it went
    wired.say(lost, Tokens(), *batch.arrays(), at=2.0)
    assert len(opened.stream.choices[0].ids) == 3


def test_streams_of_the_last_scheduler_wait_for_whichever_is_back_first() -> None:
    wired = Wired()
    opened = wired.open_at(0)
    wired.tables.lose(1, "gone", 1.0)
    wired.tables.lose(0, "gone", 1.0)
    wired.say(1, GatewayWelcome(9, BEAT_SECONDS, LEASE_SECONDS), at=2.0)
    assert wired.submits(1) == []  # it serves nothing yet
    wired.say(1, Models((ModelState(CARD, 1),)), at=2.0)
    assert [submit.handle for submit in wired.submits(1)] == [opened.stream.handle]


def test_a_request_that_waits_where_no_worker_is_left_moves_and_one_that_runs_stays() -> None:
    wired = Wired()
    waiting, running = wired.open_at(0), wired.open_at(0)
    batch = TokenBatch()
    batch.append(running.stream.handle, 0, 0, 0, true_tokens(running.stream.handle, 0)[:1])
    wired.say(0, Tokens(), *batch.arrays())
    wired.say(0, Models((ModelState(CARD, 0),)))
    assert [submit.handle for submit in wired.submits(1)] == [waiting.stream.handle]
    assert [message.handle for message in wired.sent(0) if isinstance(message, Cancel)] == [
        waiting.stream.handle
    ]
    wired.say(0, Interrupted(running.stream.handle, 0, "drain", "w"))
    assert [(s.handle, s.attempt) for s in wired.submits(1)] == [(running.stream.handle, 2)]


def test_without_any_worker_requests_wait_at_some_scheduler() -> None:
    wired = Wired((0, 0))
    wired.open()
    assert len(wired.submits(0)) + len(wired.submits(1)) == 1


def test_a_request_without_any_worker_goes_where_its_model_is_known() -> None:
    wired = Wired((0, 0))
    wired.say(0, Models(()))
    for number in range(20):
        wired.open(number)
    assert len(wired.submits(0)) == 0
    assert len(wired.submits(1)) == 20


def test_other_content_by_the_same_name_is_not_served_and_said_once() -> None:
    wired = Wired()
    other = ModelCard("m", (), "m", 0, 128, 1000, (256,), ())
    for _ in range(2):
        wired.say(1, Models((ModelState(other, 4),)))
        wired.say(1, Models((ModelState(other, 5),)))
    assert wired.models == (ModelState(CARD, 1),)
    assert wired.notes.count("schedulers serve different models by one name") == 1
    for number in range(20):
        wired.open(number)
    assert len(wired.submits(0)) == 20
    wired.say(0, Models((ModelState(CARD, 0),)))
    assert wired.models == (ModelState(other, 5),)


def test_a_scheduler_that_is_silent_for_a_lease_loses_its_streams_to_the_others() -> None:
    wired = Wired()
    opened = wired.open_at(0)
    wired.say(0, Admitted(opened.stream.handle, 0), at=1.0)
    wired.say(1, SchedulerBeat(6), at=LEASE_SECONDS)
    wired.tables.tick(LEASE_SECONDS + 1.5)
    assert [submit.handle for submit in wired.submits(1)] == [opened.stream.handle]
    assert wired.tables.connected == 1


def test_a_lost_connection_moves_streams_at_once_but_not_from_the_only_scheduler() -> None:
    wired = Wired()
    opened = wired.open_at(0)
    wired.tables.lose_connection(0, 1.0)
    assert [submit.handle for submit in wired.submits(1)] == [opened.stream.handle]
    wired.tables.lose_connection(0, 1.1)
    wired.tables.lose_connection(1, 1.1)
    assert wired.tables.connected == 1
    assert wired.submits(0) == []


def test_late_news_of_a_lost_scheduler_change_nothing() -> None:
    wired = Wired()
    wired.tables.lose(0, "gone", 1.0)
    wired.say(0, Models((ModelState(CARD, 7),)), at=1.5)
    assert wired.models == (ModelState(CARD, 1),)


def test_the_schedulers_that_have_an_asset_are_those_that_serve_a_model_with_it() -> None:
    wired = Wired()
    asset = Asset("tokenizer.json", "0" * 64, 3)
    card = ModelCard("other", (), "other", 0, 128, 259, (256,), (asset,))
    assert wired.tables.holders(asset) == []
    wired.say(1, Models((ModelState(CARD, 1), ModelState(card, 1))))
    assert wired.tables.holders(asset) == [1]
    assert [state.card.name for state in wired.models] == ["m", "other"]
    wired.tables.lose(1, "gone", 1.0)
    assert wired.tables.holders(asset) == []
