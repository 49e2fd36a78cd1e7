"""How long requests wait: deadlines, workers that do not come, and queues that are too long."""

from __future__ import annotations

import pytest
from core_driver import Driver, card

from sfllm.errors import ErrorCode
from sfllm.messages import Admitted, Models, Rejected, WorkerCancel, WorkerDraining
from sfllm_scheduler.core.events import FromWorker


def test_a_deadline_ends_a_waiting_request(driver: Driver) -> None:
    handle = driver.submit_to_model_without_worker(milliseconds_left=500)
    driver.tick(0.4)
    assert driver.to_gateway(Rejected) == []
    driver.tick(0.2)
    (rejected,) = driver.to_gateway(Rejected)
    assert (rejected.handle, rejected.code) == (handle, ErrorCode.DEADLINE_EXCEEDED)


def test_a_deadline_ends_a_running_request_and_frees_it_at_the_worker(driver: Driver) -> None:
    worker = driver.worker()
    handle = driver.submit(milliseconds_left=500)
    driver.tick()
    driver.tick(0.6)
    assert driver.to_gateway(Rejected)[0].code == ErrorCode.DEADLINE_EXCEEDED
    assert driver.to_worker(WorkerCancel, worker)[0].handle == handle


def test_without_a_worker_a_request_waits_a_while_and_is_then_refused() -> None:
    driver = Driver(worker_wait_seconds=3.0, lease_seconds=1e6)
    driver.gateway()
    early = driver.submit_to_model_without_worker()
    driver.tick(2.0)
    late = driver.submit()
    driver.tick(1.5)
    (rejected,) = driver.to_gateway(Rejected)
    assert (rejected.handle, rejected.code) == (early, ErrorCode.SERVICE_UNAVAILABLE)
    driver.tick(2.0)
    assert driver.to_gateway(Rejected)[-1].handle == late


def test_patience_counts_from_the_loss_of_the_last_worker_not_from_the_submit() -> None:
    driver = Driver(worker_wait_seconds=3.0, lease_seconds=1e6)
    driver.gateway()
    worker = driver.worker(slots=1)
    driver.submit()
    driver.submit()
    driver.tick(10.0)
    driver.leave(worker)
    driver.tick(2.0)
    assert driver.to_gateway(Rejected) == []
    driver.tick(1.5)
    assert len(driver.to_gateway(Rejected)) == 1


def test_what_the_remaining_workers_cannot_hold_is_refused_after_a_while() -> None:
    driver = Driver(worker_wait_seconds=3.0, lease_seconds=1e6)
    driver.gateway()
    large = driver.worker("large", kv_tokens=2000, slots=1)
    driver.worker("small", kv_tokens=100)
    first, second = driver.submit(1000), driver.submit(1000)
    driver.tick()
    assert driver.grants(large) == [[first]]
    driver.leave(large)
    driver.tick(2.0)
    assert driver.to_gateway(Rejected) == []
    driver.tick(2.0)
    assert [(r.handle, r.code) for r in driver.to_gateway(Rejected)] == [
        (second, ErrorCode.CONTEXT_LENGTH_EXCEEDED)
    ]


def backlog(driver: Driver, *, seconds_each: float, served: int, slots: int = 1, waiting: int = 40) -> bytes:
    """A worker that has been served so many from a queue that is never empty, and has so many left."""
    worker = driver.worker(slots=slots)
    handles = [driver.submit() for _ in range(served + waiting)]
    for handle in handles[:served]:
        driver.tick()
        driver.now += seconds_each
        driver.finish(worker, handle)
    driver.tick()
    return worker


def test_a_request_that_would_wait_beyond_its_deadline_is_refused_at_once() -> None:
    driver = Driver(lease_seconds=1e6)
    driver.gateway()
    backlog(driver, seconds_each=2.0, served=20)
    driver.submit(milliseconds_left=20_000)
    (rejected,) = driver.to_gateway(Rejected)
    assert rejected.code == ErrorCode.QUEUE_FULL
    assert "39 requests go first, which takes about 7" in rejected.message
    assert "deadline is in 20 s" in rejected.message
    assert 40 <= (rejected.retry_after_seconds or 0) <= 60


def test_a_request_with_time_enough_waits_and_so_does_one_that_goes_before_the_others() -> None:
    driver = Driver(lease_seconds=1e6)
    driver.gateway()
    backlog(driver, seconds_each=2.0, served=20)
    driver.submit(milliseconds_left=100_000)
    driver.submit(milliseconds_left=20_000, priority=-1)
    driver.submit(milliseconds_left=20_000, attempt=1)
    assert driver.to_gateway(Rejected) == []


def test_a_queue_that_moves_fast_refuses_nobody() -> None:
    driver = Driver(lease_seconds=1e6)
    driver.gateway()
    backlog(driver, seconds_each=0.1, served=20)
    driver.submit(milliseconds_left=20_000)
    assert driver.to_gateway(Rejected) == []


def test_without_enough_grants_under_load_nobody_knows_the_wait_and_nobody_is_refused() -> None:
    driver = Driver(lease_seconds=1e6)
    driver.gateway()
    worker = driver.worker(slots=1)
    for _ in range(20):  # one request now and then: that is how they come, not how fast they could go
        handle = driver.submit()
        driver.tick()
        driver.now += 30.0
        driver.finish(worker, handle)
        driver.tick()
    for _ in range(40):
        driver.submit(milliseconds_left=1000)
    driver.tick()
    driver.submit(milliseconds_left=1000)
    assert driver.to_gateway(Rejected) == []


def test_as_many_as_run_at_once_may_wait_however_slow_it_goes() -> None:
    driver = Driver(lease_seconds=1e6)
    driver.gateway()
    backlog(driver, seconds_each=5.0, served=20, slots=4, waiting=7)
    driver.submit(milliseconds_left=1)
    assert driver.to_gateway(Rejected) == []


def test_a_worker_that_joins_makes_the_wait_unknown() -> None:
    driver = Driver(lease_seconds=1e6)
    driver.gateway()
    backlog(driver, seconds_each=2.0, served=20)
    driver.worker("W2", slots=1)
    driver.submit(milliseconds_left=20_000)
    assert driver.to_gateway(Rejected) == []


# retries ---------------------------------------------------------------------------------------


def test_a_retry_waits_for_a_worker_until_its_deadline() -> None:
    driver = Driver(worker_wait_seconds=3.0, lease_seconds=1e6)
    driver.gateway()
    first = driver.submit_to_model_without_worker()
    retry = driver.submit(attempt=1, milliseconds_left=20_000)
    driver.tick(4.0)
    assert [r.handle for r in driver.to_gateway(Rejected)] == [first]
    driver.tick(17.0)
    assert [(r.handle, r.code) for r in driver.to_gateway(Rejected)][1:] == [
        (retry, ErrorCode.DEADLINE_EXCEEDED)
    ]


def test_a_first_attempt_whose_only_workers_drain_is_refused_after_a_while() -> None:
    driver = Driver(worker_wait_seconds=3.0, lease_seconds=1e6)
    driver.gateway()
    worker = driver.worker()
    driver.send(FromWorker(worker, WorkerDraining(driver.lease(worker))))
    first, retry = driver.submit(), driver.submit(attempt=2)
    driver.tick(4.0)
    assert [(r.handle, r.code) for r in driver.to_gateway(Rejected)] == [
        (first, ErrorCode.SERVICE_UNAVAILABLE)
    ]
    other = driver.worker("W2")
    driver.tick()
    assert driver.grants(other) == [[retry]]


def test_a_retry_comes_to_a_restarted_scheduler_before_the_workers_do(driver: Driver) -> None:
    handle = driver.submit(attempt=3)
    assert driver.to_gateway(Admitted) == [Admitted(handle, 3)]
    assert driver.to_gateway(Models)[-1].models == ()
    worker = driver.worker()
    driver.tick()
    assert driver.grants(worker) == [[handle]]
    assert [state.card for state in driver.to_gateway(Models)[-1].models] == [card()]


def test_a_retry_waits_for_a_worker_as_large_as_its_last_one() -> None:
    driver = Driver(worker_wait_seconds=3.0, lease_seconds=1e6)
    driver.gateway()
    driver.worker("small", kv_tokens=100)
    retry = driver.submit(1000, attempt=1)
    driver.tick(10.0)
    assert driver.to_gateway(Rejected) == []
    large = driver.worker("large", kv_tokens=2000)
    driver.tick()
    assert driver.grants(large) == [[retry]]


@pytest.mark.parametrize(("age", "goes_first"), [(5_000, True), (0, False), (-5_000, False), (2**63, True)])
def test_a_retry_keeps_its_place_at_a_restarted_scheduler_by_its_age(age: int, goes_first: bool) -> None:
    driver = Driver()
    driver.gateway()
    worker = driver.worker(slots=1)
    driver.submit()
    driver.tick()
    driver.submit(priority=0)
    driver.now += 1.0
    retry = driver.submit(attempt=1, age_milliseconds=age)
    driver.finish(worker, 1)
    driver.tick()
    assert driver.grants(worker)[1] == [retry if goes_first else 2]
