"""Requests and choices that are called off, wherever they are."""

from __future__ import annotations

from core_driver import Driver, lists

from sfllm.messages import (
    ALL_CHOICES,
    Finished,
    Grant,
    WorkerCancel,
)
from sfllm_scheduler.core.events import ToWorker


def test_a_cancelled_request_leaves_the_queue(driver: Driver) -> None:
    handle = driver.submit_to_model_without_worker()
    driver.cancel(handle)
    worker = driver.worker()
    driver.tick()
    assert driver.grants(worker) == []


def test_a_cancelled_running_request_makes_room_for_the_next_in_the_same_turn(driver: Driver) -> None:
    worker = driver.worker(slots=1)
    handle, following = driver.submit(), driver.submit()
    driver.tick()
    assert driver.grants(worker) == [[handle]]
    driver.cancel(handle)
    driver.tick()
    sent = [type(action.message) for action in driver.log if isinstance(action, ToWorker)]
    assert sent[-2:] == [WorkerCancel, Grant], "the worker lets go before it gets more"
    assert driver.grants(worker) == [[handle], [following]]


def test_what_a_worker_still_says_of_a_cancelled_request_is_dropped(driver: Driver) -> None:
    worker = driver.worker()
    handle = driver.submit()
    driver.tick()
    driver.cancel(handle)
    driver.finish(worker, handle, reason="abort")
    assert driver.to_gateway(Finished) == []
    assert len(driver.records("dropped")) == 1


def test_one_choice_can_be_cancelled_while_it_waits(driver: Driver) -> None:
    handle = driver.submit_to_model_without_worker(
        3, choices=(0, 1, 2), generated=(10, 20, 21, 30), generated_counts=(1, 2, 1)
    )
    driver.cancel(handle, choice=1)
    driver.worker("W2")
    driver.tick()
    entry = driver.granted(handle)
    assert (entry.choices, entry.generated_counts) == ((0, 2), (1, 1))
    grant = next(a for a in driver.log if getattr(a, "message", None).__class__ is Grant)
    assert lists(grant.arrays) == [[0, 1, 2], [10, 30], []]


def test_cancelling_the_last_waiting_choice_ends_the_request(driver: Driver) -> None:
    handle = driver.submit_to_model_without_worker(choices=(0, 1))
    driver.cancel(handle, choice=0)
    driver.cancel(handle, choice=1)
    assert driver.core.state.waiting_count == 0


def test_one_choice_of_a_running_request_is_cancelled_at_the_worker(driver: Driver) -> None:
    worker = driver.worker()
    handle = driver.submit(choices=(0, 1))
    driver.tick()
    driver.cancel(handle, choice=1)
    driver.cancel(handle, choice=1)
    assert [c.choice for c in driver.to_worker(WorkerCancel, worker)] == [1]
    driver.finish(worker, handle, 0)
    assert driver.state_of(worker).used_slots == 0
    assert [end.choice for end in driver.to_gateway(Finished)] == [0]


def test_cancelling_the_last_open_choice_of_a_running_request_ends_it(driver: Driver) -> None:
    worker = driver.worker()
    handle = driver.submit(choices=(0, 1))
    driver.tick()
    driver.finish(worker, handle, 0)
    driver.cancel(handle, choice=1)
    assert driver.state_of(worker).used_slots == 0
    assert driver.to_worker(WorkerCancel, worker)[-1].choice == ALL_CHOICES


def test_a_cancel_of_an_older_attempt_spares_the_newer(driver: Driver) -> None:
    worker = driver.worker()
    handle = driver.submit(attempt=1)
    driver.cancel(handle, attempt=0)
    driver.tick()
    assert driver.grants(worker) == [[handle]]
