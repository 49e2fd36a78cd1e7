"""Taking back from busy workers what an idle one could begin at once."""

from __future__ import annotations

import pytest
from core_driver import GATEWAY, Driver

from sfllm.messages import Interrupted, Recall, WorkerReturned
from sfllm_scheduler.core.events import FromWorker

SLOW = (0.1, 0.01, 0.001, 0.0)


@pytest.fixture
def busy(driver: Driver) -> tuple[bytes, list[int]]:
    """A slow worker with three steps of prefill, and what it was granted."""
    worker = driver.worker("busy", slots=8, step_tokens=100)
    driver.worker_beat(worker, step_curve=SLOW)
    handles = [driver.submit(60) for _ in range(4)]
    driver.tick()
    assert driver.all_granted(worker) == handles
    return worker, handles


def recalls(driver: Driver, worker: bytes) -> list[int]:
    return [message.handle for message in driver.to_worker(Recall, worker)]


def give_back(driver: Driver, worker: bytes, handle: int) -> None:
    driver.send(FromWorker(worker, WorkerReturned(driver.lease(worker), GATEWAY, handle, 0)))


def test_an_idle_worker_gets_the_newest_of_what_waits_at_a_busy_one(
    driver: Driver, busy: tuple[bytes, list[int]]
) -> None:
    worker, handles = busy
    idle = driver.worker("idle", slots=8, step_tokens=100)
    driver.tick(1.0)
    assert recalls(driver, worker) == [handles[-1]]
    give_back(driver, worker, handles[-1])
    assert driver.to_gateway(Interrupted) == [Interrupted(handles[-1], 0, "moved", "busy")]
    driver.submit(60, handle=handles[-1], attempt=1, last_worker="busy")
    driver.tick()
    assert driver.grants(idle) == [[handles[-1]]]


def test_nothing_is_recalled_twice_nor_after_it_moved(driver: Driver, busy: tuple[bytes, list[int]]) -> None:
    worker, handles = busy
    driver.worker("idle", slots=8, step_tokens=100)
    for _ in range(6):
        driver.tick(0.5)
    asked = recalls(driver, worker)
    assert len(asked) == len(set(asked)) <= 2, "what is next in line stays"
    assert handles[0] not in asked


def test_nothing_is_recalled_without_an_idle_worker(driver: Driver, busy: tuple[bytes, list[int]]) -> None:
    worker, _ = busy
    other = driver.worker("other", slots=1, step_tokens=100)
    driver.submit(10)
    driver.tick()
    assert driver.grants(other), "it has no room any more"
    driver.tick(1.0)
    assert not recalls(driver, worker)


def test_nothing_is_recalled_when_the_busy_worker_is_nearly_done(
    driver: Driver, busy: tuple[bytes, list[int]]
) -> None:
    worker, _ = busy
    driver.progress(worker, 40)
    driver.worker("idle", slots=8, step_tokens=100)
    driver.tick(1.0)
    assert not recalls(driver, worker)


def test_a_recalled_request_that_goes_on_ends_as_usual(driver: Driver, busy: tuple[bytes, list[int]]) -> None:
    worker, handles = busy
    driver.worker("idle", slots=8, step_tokens=100)
    driver.tick(1.0)
    assert recalls(driver, worker)
    for handle in handles:
        driver.finish(worker, handle)
    assert not driver.to_gateway(Interrupted)
    assert not driver.state_of(worker).holds


def test_a_lost_answer_is_found_by_the_next_beats(driver: Driver, busy: tuple[bytes, list[int]]) -> None:
    worker, _ = busy
    driver.worker("idle", slots=8, step_tokens=100)
    driver.tick(1.0)
    driver.worker_beat(worker, ())
    driver.worker_lists(worker)
    assert {message.cause for message in driver.to_gateway(Interrupted)} == {"lost"}
    assert driver.state_of(worker).prefill.tokens == 0
