"""A worker of another scheduler asks whether this one is there: it is told, and nothing else happens."""

from __future__ import annotations

from core_driver import EPOCH, Driver

from sfllm.messages import NO_LEASE, WorkerBeat, WorkerUnknown
from sfllm.wire import as_array
from sfllm_scheduler.core.events import FromWorker, ToWorker

ELSEWHERE = b"w-elsewhere"


def test_a_worker_of_another_scheduler_hears_that_this_one_is_there_and_is_not_counted() -> None:
    driver = Driver()
    probe = FromWorker(ELSEWHERE, WorkerBeat(NO_LEASE, 0, 0, 0, 0), (as_array("Q", ()),))
    for _ in range(3):
        assert driver.send(probe) == [ToWorker(ELSEWHERE, WorkerUnknown(EPOCH))]
        driver.tick(1.0)
    assert driver.core.state.workers == {}
