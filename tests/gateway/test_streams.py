from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_model import BEAT_SECONDS, LEASE_SECONDS, LENGTH, SchedulerModel, Sent, true_tokens

from sfllm import holdings, wire
from sfllm.errors import ErrorCode, ServiceError
from sfllm.holdings import OpenChoice
from sfllm.messages import (
    ALL_CHOICES,
    Admitted,
    Cancel,
    Finished,
    GatewayBeat,
    GatewayBye,
    GatewayHeld,
    GatewayHello,
    GatewayWelcome,
    Interrupted,
    ListHeld,
    Message,
    Models,
    ModelState,
    Rejected,
    Resend,
    Sampling,
    SchedulerBeat,
    Submit,
    Timings,
    Tokens,
)
from sfllm.token_batch import TokenBatch
from sfllm_gateway.stream import RESEND_SECONDS, Request
from sfllm_gateway.streams import (
    DEADLINE_GRACE_SECONDS,
    HELLO_SECONDS,
    RESTART_SECONDS,
    SUBMIT_REPEAT_SECONDS,
    ClearOutbox,
    OpenStream,
    StreamTable,
)

IDENTITY = b"g-test"
FAR = 1e9


def request(n: int = 1, logprobs: int = -1) -> Request:
    return Request("r-1", "m", array("I", [1, 2]), n, Sampling(max_tokens=LENGTH, seed=1, logprobs=logprobs))


class Client:
    """Who reads a stream: notes its end once and sees that it stays."""

    def __init__(self) -> None:
        self.opened: OpenStream | None = None
        self.stopped: dict[int, int] = {}
        self.result: object = None

    def look(self) -> None:
        assert self.opened is not None
        stream = self.opened.stream
        handle = stream.handle
        for choice, journal in enumerate(stream.choices):
            expected = true_tokens(handle, choice)
            assert list(journal.ids) == expected[: len(journal.ids)]
            assert len(journal.logprobs) in ({len(journal.ids)} if journal.logprobs.width else {0})
            if choice in self.stopped:
                assert (len(journal.ids), journal.finish_reason) == (self.stopped[choice], "stop")
            elif journal.finish_reason is not None:
                assert len(journal.ids) == len(expected)
                assert journal.finish_reason == ("length" if len(expected) == LENGTH else "stop")
        if self.result is not None:
            assert self.result == self._end()
        elif stream.ended:
            self.result = self._end()

    def _end(self) -> object:
        assert self.opened is not None
        stream = self.opened.stream
        return stream.error, [(journal.finish_reason, list(journal.ids)) for journal in stream.choices]


class FaultyLink:
    """A table and a scheduler, between which messages come late, twice, out of order or never."""

    def __init__(self, chance: random.Random, faults: float) -> None:
        self.chance = chance
        self.faults = faults
        self.now = 0.0
        self.table = StreamTable(IDENTITY, 77, 10**6, lambda _models: None)
        self.scheduler = SchedulerModel(IDENTITY)
        self.clients: list[Client] = []
        self.to_scheduler: list[Sent] = []
        self.to_gateway: list[Sent] = []
        self.settle()

    def collect(self) -> None:
        """Put on the network what both sides have to say."""
        for item in self.table.take_outgoing():
            if not isinstance(item, ClearOutbox):
                wire.encode(item.message, *item.arrays)
                self.to_scheduler.append((item.message, item.arrays))
        self.to_gateway += self.scheduler.outgoing
        self.scheduler.outgoing = []

    def deliver(self, lane: list[Sent], index: int) -> None:
        message, arrays = lane.pop(index)
        if lane is self.to_gateway:
            self.table.handle(message, arrays, self.now)
        else:
            self.scheduler.take(message, arrays)
        self.collect()

    def settle(self) -> None:
        """A sound network for a while."""
        for _ in range(12):
            self.pass_time(0.5)
            while lane := self.to_scheduler or self.to_gateway:
                self.deliver(lane, 0)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.scheduler.beat()
        self.table.tick(self.now)
        self.collect()

    @property
    def running(self) -> list[tuple[int, int]]:
        return [(handle, choice) for handle, live in self.scheduler.live.items() for choice in live.counts]

    # one step of a disorderly world

    def step(self) -> None:
        actions = (self.traffic, self.open, self.stop_string, self.leave, self.lose_worker, self.rare)
        self.chance.choices(actions, (30, 3, 1, 1, 1, 1))[0]()
        self.collect()
        self.check()

    def traffic(self) -> None:
        chance = self.chance
        if self.running:
            self.scheduler.make_tokens(*chance.choice(self.running), chance.randint(1, 3))
        self.pass_time(chance.choice((0.01, 0.1, 0.4)))
        for lane in (self.to_scheduler, self.to_gateway):
            for _ in range(min(len(lane), chance.randint(0, 8))):
                late = chance.random() < self.faults
                index = chance.randrange(len(lane)) if late else 0
                if chance.random() < self.faults:
                    lane.append(lane[index])
                if chance.random() < self.faults:
                    del lane[index]
                else:
                    self.deliver(lane, index)

    def open(self) -> None:
        if len(self.clients) < 4 and self.table.connected:
            client = Client()
            asked = request(self.chance.randint(1, 3), self.chance.choice((-1, -1, 0)))
            client.opened = self.table.open(asked, FAR, self.now, client.look)
            self.clients.append(client)

    def stop_string(self) -> None:
        for client in self.clients[:1]:
            assert client.opened is not None
            stream = client.opened.stream
            for choice in stream.open_choices[:1]:
                kept = self.chance.randint(0, len(stream.choices[choice].ids))
                client.stopped[choice] = kept
                self.table.stop_choice(client.opened, choice, kept, self.now)

    def leave(self) -> None:
        if self.clients:
            client = self.clients.pop(self.chance.randrange(len(self.clients)))
            assert client.opened is not None
            self.table.release(client.opened, "left", self.now)

    def lose_worker(self) -> None:
        suspects = self.chance.randint(0, 3)
        for handle in list(self.scheduler.live):
            self.scheduler.interrupt(handle, suspects)

    def rare(self) -> None:
        kind = self.chance.choice(("scheduler", "rejection", "silence"))
        if kind == "scheduler":
            self.scheduler.restart()
        elif kind == "silence":
            self.pass_time(LEASE_SECONDS + 1)
        elif self.scheduler.live:
            self.scheduler.reject(min(self.scheduler.live))

    # what must hold

    def check(self) -> None:
        held = []
        for client in self.clients:
            client.look()
            assert client.opened is not None
            stream = client.opened.stream
            held += [
                OpenChoice(IDENTITY, stream.handle, stream.attempt, choice) for choice in stream.open_choices
            ]
        assert self.table.digest == holdings.digest(held)

    def finish(self) -> None:
        """On a sound network every request ends, and nothing is left behind."""
        for _ in range(4):
            self.settle()
            for handle, choice in self.running:
                self.scheduler.make_tokens(handle, choice, LENGTH)
        self.settle()
        for client in self.clients:
            assert client.result is not None
            assert client.opened is not None
            self.table.release(client.opened, "read", self.now)
        self.settle()
        assert not self.scheduler.live
        assert self.table.digest == 0


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 200), faults=st.sampled_from([0.0, 0.02, 0.1, 0.3]))
def test_whatever_the_network_does_tokens_are_true_and_each_request_ends_once(
    seed: int, steps: int, faults: float
) -> None:
    link = FaultyLink(random.Random(seed), faults)
    for _ in range(steps):
        link.step()
    link.finish()


class Wired:
    """A table that was welcomed at time 0."""

    def __init__(self) -> None:
        self.models: list[ModelState] = []
        self.table = StreamTable(IDENTITY, 77, 4, self.models.extend)
        self.table.tick(0.0)
        self.say(GatewayWelcome(5, BEAT_SECONDS, LEASE_SECONDS), at=0.0)
        self.sent()

    def say(self, message: Message, *arrays: wire.Array, at: float) -> None:
        self.table.handle(message, arrays, at)

    def tokens(self, handle: int, attempt: int, choice: int, start: int, ids: list[int], at: float) -> None:
        batch = TokenBatch()
        batch.append(handle, attempt, choice, start, ids)
        self.say(Tokens(), *batch.arrays(), at=at)

    def open(self, n: int = 1, deadline: float = FAR) -> OpenStream:
        return self.table.open(request(n), deadline, 0.0, lambda: None)

    def sent(self) -> list[Message | ClearOutbox]:
        return [
            item if isinstance(item, ClearOutbox) else item.message for item in self.table.take_outgoing()
        ]

    def sent_of(self, kind: type[Message]) -> list[Message]:
        return [item for item in self.sent() if isinstance(item, kind)]


@pytest.fixture
def wired() -> Wired:
    return Wired()


def test_without_a_scheduler_a_request_is_refused_and_hellos_are_repeated() -> None:
    table = StreamTable(IDENTITY, 77, 4, lambda _models: None)
    with pytest.raises(ServiceError, match="cannot be reached"):
        table.open(request(), FAR, 0.0, lambda: None)
    table.tick(0.0)
    table.tick(HELLO_SECONDS / 2)
    clear, hello = table.take_outgoing()
    assert isinstance(clear, ClearOutbox)
    assert not isinstance(hello, ClearOutbox)
    assert hello.message == GatewayHello(77)
    table.tick(HELLO_SECONDS)
    assert len(table.take_outgoing()) == 2


def test_a_submit_is_repeated_until_it_is_acknowledged(wired: Wired) -> None:
    wired.open(deadline=60.0)
    wired.table.tick(SUBMIT_REPEAT_SECONDS)
    first, second = wired.sent_of(Submit)
    assert isinstance(first, Submit)
    assert isinstance(second, Submit)
    assert (first.attempt, first.milliseconds_left, first.age_milliseconds) == (0, 60_000, 0)
    assert (second.attempt, second.milliseconds_left, second.age_milliseconds) == (0, 58_000, 2_000)
    wired.say(Admitted(1, 0), at=2.0)
    wired.table.tick(5.0)
    assert not wired.sent_of(Submit)


def test_a_beat_carries_the_digest_and_a_list_the_open_choices(wired: Wired) -> None:
    wired.open(n=2)
    other = wired.open()
    wired.table.stop_choice(other, 0, 0, 0.5)
    wired.sent()
    wired.table.tick(BEAT_SECONDS)
    held = [OpenChoice(IDENTITY, 1, 0, choice) for choice in (0, 1)]
    assert wired.sent_of(GatewayBeat) == [GatewayBeat(77, holdings.digest(held))]
    wired.say(Finished(1, 0, 1, "stop", -1, 2, 0, 0, Timings()), at=2.5)
    wired.say(ListHeld(9), at=3.0)
    (answer,) = wired.table.take_outgoing()
    assert not isinstance(answer, ClearOutbox)
    assert answer.message == GatewayHeld(9)
    assert [list(column) for column in answer.arrays] == [[1], [0], [0]]


def test_missing_tokens_are_asked_for_once_and_after_a_while_made_anew(wired: Wired) -> None:
    wired.open()
    wired.sent()
    wired.tokens(1, 0, 0, 3, [9], at=1.0)
    wired.tokens(1, 0, 0, 4, [9], at=1.5)
    assert wired.sent() == [Resend(1, 0, 0, 0)]
    wired.table.tick(0.9 + RESEND_SECONDS)
    assert not wired.sent_of(Cancel)
    wired.table.tick(1.0 + RESEND_SECONDS)
    cancel, submit = wired.sent()[-2:]
    assert cancel == Cancel(1, 0, ALL_CHOICES, "gap")
    assert isinstance(submit, Submit)
    assert submit.attempt == 1


def test_an_end_before_its_tokens_begins_the_next_attempt(wired: Wired) -> None:
    opened = wired.open()
    wired.sent()
    wired.say(Finished(1, 0, 0, "stop", -1, 2, 0, 3, Timings()), at=1.0)
    assert [type(message) for message in wired.sent()] == [Cancel, Submit]
    wired.tokens(1, 0, 0, 0, [1, 2, 3], at=1.1)
    assert not opened.stream.choices[0].ids
    assert not opened.stream.ended


def test_attempts_for_missing_tokens_are_spaced_and_another_cause_settles_what_is_due(wired: Wired) -> None:
    opened = wired.open()
    lost_end = [Finished(1, attempt, 0, "stop", -1, 2, 0, 3, Timings()) for attempt in range(3)]
    wired.say(lost_end[0], at=1.0)
    wired.say(lost_end[1], at=1.1)
    assert opened.stream.attempt == 1
    wired.say(Interrupted(1, 1, "drain", "w"), at=1.2)
    wired.table.tick(1.0 + RESTART_SECONDS)
    assert opened.stream.attempt == 2  # the drain's: of this attempt nothing is missing
    wired.say(lost_end[2], at=1.1 + RESTART_SECONDS)
    assert opened.stream.attempt == 3


@pytest.mark.parametrize("at", [1.0, 2 * HELLO_SECONDS + 0.1])
@pytest.mark.parametrize("epoch", [5, 6])
def test_a_second_welcome_is_a_repeat_or_says_that_the_gateway_is_not_known(
    wired: Wired, at: float, epoch: int
) -> None:
    opened = wired.open()
    wired.say(Admitted(1, 0), at=0.1)
    wired.sent()
    wired.say(GatewayWelcome(epoch, BEAT_SECONDS, LEASE_SECONDS), at=at)
    if at == 1.0 and epoch == 5:
        assert not wired.sent()
        return
    assert wired.sent_of(GatewayHello)
    assert not wired.table.connected
    wired.say(GatewayWelcome(epoch, BEAT_SECONDS, LEASE_SECONDS), at=at)
    (submit,) = wired.sent()
    assert isinstance(submit, Submit)
    assert (submit.attempt, opened.stream.attempt) == (1, 1)


def test_a_silent_scheduler_is_given_up_and_open_requests_wait_for_the_next(wired: Wired) -> None:
    opened = wired.open()
    wired.say(SchedulerBeat(5), at=1.0)
    wired.table.tick(1.0 + LEASE_SECONDS)
    assert wired.table.connected
    wired.table.tick(1.1 + LEASE_SECONDS)
    assert not wired.table.connected
    assert isinstance(wired.sent()[-2], ClearOutbox)
    wired.table.stop_choice(opened, 0, 0, 8.0)
    assert not wired.sent()
    assert opened.stream.ended


def test_another_schedulers_beat_is_answered_with_a_hello(wired: Wired) -> None:
    wired.say(SchedulerBeat(6), at=1.0)
    assert wired.sent_of(GatewayHello)


def test_moves_do_not_use_up_attempts_and_a_retry_keeps_its_age(wired: Wired) -> None:
    wired.open()
    for attempt in range(8):
        wired.say(Interrupted(1, attempt, "drain", f"w-{attempt}"), at=float(attempt))
    last = wired.sent_of(Submit)[-1]
    assert isinstance(last, Submit)
    assert (last.attempt, last.last_worker, last.age_milliseconds) == (8, "w-7", 7_000)


def test_answers_for_older_attempts_and_repeated_ends_change_nothing(wired: Wired) -> None:
    opened = wired.open()
    wired.say(Interrupted(1, 0, "lost", "w"), at=1.0)
    wired.sent()
    for late in (Interrupted(1, 0, "lost", "w"), Rejected(1, 0, "queue_full", "no"), Admitted(1, 0)):
        wired.say(late, at=2.0)
    assert not wired.sent()
    assert not opened.stream.admitted
    for _ in range(2):
        wired.say(Rejected(1, 1, "queue_full", "first"), at=3.0)
    wired.say(Rejected(1, 1, "engine_failure", "second"), at=3.0)
    assert opened.stream.error is not None
    assert opened.stream.error.message == "first"
    assert wired.table.digest == 0


@pytest.mark.parametrize("connected", [True, False])
def test_a_request_that_nobody_ends_ends_at_its_deadline(wired: Wired, connected: bool) -> None:
    opened = wired.open(deadline=3.0)
    wired.sent()
    if not connected:
        wired.table.lose("gone")
    wired.table.tick(3.0 + DEADLINE_GRACE_SECONDS)
    assert not opened.stream.ended
    wired.table.tick(3.1 + DEADLINE_GRACE_SECONDS)
    assert opened.stream.error is not None
    assert opened.stream.error.code is ErrorCode.DEADLINE_EXCEEDED
    assert wired.sent_of(Cancel) == ([Cancel(1, 0, ALL_CHOICES, "deadline")] if connected else [])


def test_a_released_stream_is_cancelled_once_and_forgotten(wired: Wired) -> None:
    opened = wired.open()
    wired.sent()
    for _ in range(2):
        wired.table.release(opened, "left", 1.0)
    assert wired.sent() == [Cancel(1, 0, ALL_CHOICES, "left")]
    wired.tokens(1, 0, 0, 0, [1], at=1.0)
    assert not opened.stream.choices[0].ids
    assert wired.table.digest == 0


def test_wake_may_release_the_stream_that_it_is_about(wired: Wired) -> None:
    found: list[OpenStream] = []

    def wake() -> None:
        for opened in found:
            wired.table.release(opened, "read", 1.0)

    found += [wired.table.open(request(), FAR, 0.0, wake) for _ in range(3)]
    wired.say(GatewayWelcome(6, BEAT_SECONDS, LEASE_SECONDS), at=1.0)
    wired.say(GatewayWelcome(6, BEAT_SECONDS, LEASE_SECONDS), at=1.0)
    assert wired.table.digest == 0
    wired.sent()
    wired.table.tick(4.0)
    assert not wired.sent_of(Submit)


def test_models_are_passed_on_and_a_goodbye_is_said(wired: Wired) -> None:
    wired.say(Models(()), at=1.0)
    assert wired.models == []
    wired.table.bye()
    assert wired.sent() == [GatewayBye(77)]


def test_a_message_that_does_not_belong_here_is_refused(wired: Wired) -> None:
    with pytest.raises(wire.WireError):
        wired.say(GatewayHello(1), at=1.0)
