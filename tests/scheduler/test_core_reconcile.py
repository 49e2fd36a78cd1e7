"""What the two sides of a link do when they do not hold the same."""

from __future__ import annotations

import pytest
from core_driver import EPOCH, GATEWAY, Driver

from sfllm.holdings import OpenChoice
from sfllm.messages import (
    Finished,
    GatewayBeat,
    GatewayHeld,
    GatewayWelcome,
    Interrupted,
    ListHeld,
    Resend,
    WorkerBeat,
    WorkerCancel,
    WorkerDraining,
    WorkerHeld,
    WorkerResend,
    WorkerReturned,
    WorkerUnknown,
)
from sfllm.wire import Array, as_array
from sfllm_scheduler.core.events import FromGateway, FromWorker, ToGateway, ToWorker


def choice(handle: int, attempt: int = 0, number: int = 0) -> OpenChoice:
    return OpenChoice(GATEWAY, handle, attempt, number)


def running(driver: Driver, **changes: object) -> tuple[bytes, int]:
    worker = driver.worker()
    handle = driver.submit(**changes)
    driver.tick()
    return worker, handle


# beats ------------------------------------------------------------------------------------------


def test_a_beat_with_the_same_digest_is_answered_with_nothing(driver: Driver) -> None:
    worker, handle = running(driver, choices=(0, 1))
    both = [choice(handle, number=0), choice(handle, number=1)]
    driver.worker_beat(worker, both)
    driver.gateway_beat(held=both)
    assert driver.to_worker(ListHeld, worker) == driver.to_gateway(ListHeld) == []
    driver.finish(worker, handle, 1)
    driver.worker_beat(worker, both[:1])
    driver.gateway_beat(held=both[:1])
    assert driver.to_worker(ListHeld, worker) == driver.to_gateway(ListHeld) == []


def test_every_beat_with_another_digest_asks_once_and_counts_the_questions(driver: Driver) -> None:
    worker, _ = running(driver)
    for _ in range(2):
        driver.worker_beat(worker, [])
        driver.gateway_beat(held=[])
    assert driver.to_worker(ListHeld, worker) == [ListHeld(1), ListHeld(2)]
    assert driver.to_gateway(ListHeld) == [ListHeld(1), ListHeld(2)]


def test_a_beat_of_an_unknown_worker_tells_it_to_start_over(driver: Driver) -> None:
    (answer,) = [
        a
        for a in driver.send(FromWorker(b"w-x", WorkerBeat(9, 1, 0, 0, 0), (as_array("Q", ()),)))
        if type(a) is ToWorker
    ]
    assert (answer.peer, answer.message) == (b"w-x", WorkerUnknown(EPOCH))


def test_a_beat_of_an_older_lease_tells_the_worker_to_start_over_unless_its_welcome_is_under_way(
    driver: Driver,
) -> None:
    worker = driver.worker()
    stale = driver.lease(worker)
    driver.worker()
    driver.send(FromWorker(worker, WorkerBeat(stale, 1, 0, 0, 0), (as_array("Q", ()),)))
    assert driver.to_worker(WorkerUnknown, worker) == []
    driver.now += 2.0
    driver.send(FromWorker(worker, WorkerBeat(stale, 1, 0, 0, 0), (as_array("Q", ()),)))
    assert driver.to_worker(WorkerUnknown, worker) == [WorkerUnknown(EPOCH)]


@pytest.mark.parametrize("message", [GatewayBeat(1, 0), Resend(1, 0, 0, 3), GatewayHeld(1)])
def test_an_unknown_gateway_is_told_who_this_is(message: GatewayBeat | Resend | GatewayHeld) -> None:
    driver = Driver()
    arrays: tuple[Array, ...] = tuple(as_array(code, ()) for code in message.array_types)
    (answer,) = driver.send(FromGateway(b"g-x", message, arrays))
    assert isinstance(answer, ToGateway)
    assert isinstance(answer.message, GatewayWelcome)


# lists of workers -------------------------------------------------------------------------------


def test_a_grant_that_never_arrived_is_interrupted_and_its_room_is_free(driver: Driver) -> None:
    worker, handle = running(driver)
    driver.worker_beat(worker, [])
    driver.worker_lists(worker)
    assert driver.to_gateway(Interrupted) == [Interrupted(handle, 0, "lost", "W1")]
    assert driver.state_of(worker).used_slots == 0
    assert driver.records("reconciled")[0].fields == {"link": "worker", "lost": 1, "unwanted": 0}


def test_a_lost_end_of_one_choice_interrupts_the_request_and_frees_the_others(driver: Driver) -> None:
    worker, handle = running(driver, choices=(0, 1))
    driver.worker_beat(worker, [choice(handle, number=1)])
    driver.worker_lists(worker, choice(handle, number=1))
    assert driver.to_gateway(Interrupted) == [Interrupted(handle, 0, "lost", "W1")]
    (cancel,) = driver.to_worker(WorkerCancel, worker)
    assert (cancel.handle, cancel.attempt) == (handle, 0)


def test_what_was_granted_after_the_question_is_not_judged_by_the_answer(driver: Driver) -> None:
    worker = driver.worker()
    driver.worker_beat(worker, [choice(77)])
    handle = driver.submit()
    driver.tick()
    driver.worker_lists(worker, choice(77))
    assert driver.to_gateway(Interrupted) == []
    assert [cancel.handle for cancel in driver.to_worker(WorkerCancel, worker)] == [77]
    driver.worker_beat(worker, [])
    driver.worker_lists(worker)
    assert driver.to_gateway(Interrupted) == [Interrupted(handle, 0, "lost", "W1")]


def test_choices_that_a_worker_should_not_hold_are_cancelled_one_by_one(driver: Driver) -> None:
    worker, handle = running(driver, choices=(0, 1))
    strange = [OpenChoice(b"g-other", 5, 2, 3), choice(handle, number=7)]
    held = [choice(handle, number=0), choice(handle, number=1), *strange]
    driver.worker_beat(worker, held)
    driver.worker_lists(worker, *held)
    cancels = {
        OpenChoice(c.gateway, c.handle, c.attempt, c.choice) for c in driver.to_worker(WorkerCancel, worker)
    }
    assert cancels == set(strange)
    assert driver.to_gateway(Interrupted) == []


def test_an_answer_counts_once_and_only_to_a_question(driver: Driver) -> None:
    worker, handle = running(driver)
    driver.worker_lists(worker, number=1)
    driver.worker_beat(worker, [])
    held = choice(handle)
    driver.worker_lists(worker, held)
    driver.worker_lists(worker, number=1)
    driver.worker_lists(worker, number=-1)
    assert driver.to_gateway(Interrupted) == []
    assert len(driver.records("dropped")) == 3


@pytest.mark.parametrize(
    "arrays",
    [([0], [1], [0], []), ([1], [1], [0], [0]), ([0] * 2, [1], [0], [0])],
    ids=["too few choices", "no such gateway", "too many indices"],
)
def test_a_malformed_list_of_a_worker_changes_nothing(driver: Driver, arrays: tuple[list[int], ...]) -> None:
    worker, handle = running(driver)
    driver.worker_beat(worker, [])
    columns = tuple(map(as_array, "IQII", arrays))
    driver.send(FromWorker(worker, WorkerHeld(driver.lease(worker), 1, (GATEWAY,)), columns))
    assert len(driver.records("malformed")) == 1
    assert driver.to_gateway(Interrupted) == driver.to_worker(WorkerCancel, worker) == []
    driver.finish(worker, handle)
    assert len(driver.to_gateway(Finished)) == 1


# lists of gateways ------------------------------------------------------------------------------


def test_a_submit_that_never_arrived_is_told_to_be_lost(driver: Driver) -> None:
    driver.gateway_beat(held=[choice(5, 3, 0), choice(5, 3, 1)])
    driver.gateway_lists(choice(5, 3, 0), choice(5, 3, 1))
    assert driver.to_gateway(Interrupted) == [Interrupted(5, 3, "lost", "")]


def test_a_lost_end_is_told_again_as_a_lost_attempt(driver: Driver) -> None:
    worker, handle = running(driver)
    driver.finish(worker, handle)
    driver.gateway_beat(held=[choice(handle)])
    driver.gateway_lists(choice(handle))
    assert driver.to_gateway(Interrupted) == [Interrupted(handle, 0, "lost", "")]


def test_an_end_that_is_under_way_to_the_gateway_is_not_taken_for_lost(driver: Driver) -> None:
    worker, handle = running(driver)
    other = driver.submit(choices=(0, 1))
    driver.tick()
    held = [choice(handle), choice(other, number=0), choice(other, number=1)]
    driver.gateway_beat(held=[])
    driver.finish(worker, handle)
    driver.finish(worker, other, 1)
    driver.gateway_lists(*held)
    assert driver.to_gateway(Interrupted) == []
    driver.gateway_beat(held=held)
    driver.gateway_lists(*held)
    assert {i.handle for i in driver.to_gateway(Interrupted)} == {handle, other}
    assert driver.state_of(worker).used_slots == 0


def test_what_a_gateway_does_not_list_is_cancelled_choice_by_choice(driver: Driver) -> None:
    worker, handle = running(driver, choices=(0, 1))
    waiting = driver.submit(choices=(0, 1), max_tokens=4000, priority=3)
    left = [choice(handle, number=0)]
    driver.gateway_beat(held=left)
    driver.gateway_lists(*left)
    (cancel,) = driver.to_worker(WorkerCancel, worker)
    assert (cancel.handle, cancel.choice) == (handle, 1)
    assert driver.core.state.waiting_count == 0
    assert waiting not in driver.core.state.gateways[GATEWAY].requests
    assert driver.to_gateway(Interrupted) == []


def test_a_malformed_list_of_a_gateway_changes_nothing(driver: Driver) -> None:
    _, handle = running(driver)
    driver.gateway_beat(held=[])
    driver.send(FromGateway(GATEWAY, GatewayHeld(1), tuple(map(as_array, "QII", ([1], [0], [])))))
    assert len(driver.records("malformed")) == 1
    assert handle in driver.core.state.gateways[GATEWAY].requests


# resends and returns ----------------------------------------------------------------------------


def test_a_resend_goes_to_the_worker_that_runs_the_request(driver: Driver) -> None:
    worker, handle = running(driver)
    driver.send(FromGateway(GATEWAY, Resend(handle, 0, 0, 4)))
    assert driver.to_worker(WorkerResend, worker) == [
        WorkerResend(driver.lease(worker), GATEWAY, handle, 0, 0, 4)
    ]


@pytest.mark.parametrize(("attempt", "number"), [(1, 0), (0, 5)], ids=["another attempt", "no such choice"])
def test_a_resend_of_what_does_not_run_is_answered_as_lost(driver: Driver, attempt: int, number: int) -> None:
    worker, handle = running(driver)
    driver.send(FromGateway(GATEWAY, Resend(handle, attempt, number, 4)))
    assert driver.to_worker(WorkerResend, worker) == []
    assert driver.to_gateway(Interrupted) == [Interrupted(handle, attempt, "lost", "")]


def test_a_resend_from_an_impossible_index_is_malformed(driver: Driver) -> None:
    _, handle = running(driver)
    driver.send(FromGateway(GATEWAY, Resend(handle, 0, 0, -1)))
    assert len(driver.records("malformed")) == 1


def test_a_request_that_a_leaving_worker_returns_may_run_elsewhere(driver: Driver) -> None:
    worker, handle = running(driver)
    driver.send(FromWorker(worker, WorkerDraining(driver.lease(worker))))
    driver.send(FromWorker(worker, WorkerReturned(driver.lease(worker), GATEWAY, handle, 0)))
    assert driver.to_gateway(Interrupted) == [Interrupted(handle, 0, "drain", "W1")]
    assert driver.to_worker(WorkerCancel, worker) == []
    driver.send(FromWorker(worker, WorkerReturned(driver.lease(worker), GATEWAY, handle, 0)))
    assert len(driver.to_gateway(Interrupted)) == 1
