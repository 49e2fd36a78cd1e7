"""Suspects one step at a time: who becomes one, where they run, how they are cleared, who waits for them."""

from __future__ import annotations

import pytest
from core_driver import GATEWAY, Driver

from sfllm.errors import ErrorCode
from sfllm.messages import PROBATION_TOKENS, Interrupted, Rejected, WorkerBye, WorkerCancel, WorkerTokens
from sfllm.token_batch import TokenBatch
from sfllm_scheduler.core.events import FromWorker, WorkerUnreachable


def crash(driver: Driver, worker: bytes) -> None:
    driver.send(WorkerUnreachable(worker))


def blamed(driver: Driver) -> dict[int, int]:
    return {message.handle: message.suspects for message in driver.to_gateway(Interrupted)}


def tokens(driver: Driver, worker: bytes, handle: int, start: int, count: int, attempt: int = 1) -> None:
    batch = TokenBatch()
    batch.append(handle, attempt, 0, start, [7] * count)
    driver.send(FromWorker(worker, WorkerTokens(driver.lease(worker), GATEWAY), batch.arrays()))
    driver.tick()


def suspect(driver: Driver, group: int, **changes: object) -> int:
    return driver.submit(attempt=1, suspects=group, **changes)


# who is blamed ----------------------------------------------------------------------------------


def test_all_that_a_crashed_worker_held_are_suspects(driver: Driver) -> None:
    worker = driver.worker()
    handles = [driver.submit() for _ in range(3)]
    driver.tick()
    driver.send(FromWorker(worker, WorkerBye(driver.lease(worker), "CUDA error")))
    assert blamed(driver) == dict.fromkeys(handles, 3)
    assert {message.cause for message in driver.to_gateway(Interrupted)} == {"failed"}
    assert len(driver.records("worker_failed")) == 1


def test_leaving_and_saying_hello_again_make_nobody_a_suspect(driver: Driver) -> None:
    first, second = driver.worker("A", slots=1), driver.worker("B", slots=1)
    handles = [driver.submit(), driver.submit()]
    driver.tick()
    driver.leave(first)
    driver.worker("B", slots=1)
    assert blamed(driver) == dict.fromkeys(handles, 0)
    assert second in driver.core.state.workers


def test_only_suspects_that_are_not_cleared_are_blamed_for_the_next_crash(driver: Driver) -> None:
    worker = driver.worker(slots=8)
    innocent = driver.submit()
    driver.tick()
    suspects = [suspect(driver, 5) for _ in range(3)]
    driver.tick()
    tokens(driver, worker, suspects[0], 0, PROBATION_TOKENS)
    crash(driver, worker)
    assert blamed(driver) == {innocent: 0, suspects[0]: 0, suspects[1]: 2, suspects[2]: 2}


def test_a_last_suspect_that_was_not_alone_is_not_said_to_have_been(driver: Driver) -> None:
    worker = driver.worker()
    innocent = driver.submit()
    driver.tick()
    last = suspect(driver, 3)
    driver.tick()
    crash(driver, worker)
    assert blamed(driver) == {innocent: 0, last: 2}


def test_who_was_alone_at_two_crashes_is_not_tried_again(driver: Driver) -> None:
    driver.worker()
    handle = driver.submit(attempt=2, suspects=1, crashes_alone=2)
    (rejected,) = driver.to_gateway(Rejected)
    assert (rejected.handle, rejected.code) == (handle, ErrorCode.ENGINE_FAILURE)
    assert (
        rejected.message == f"request r{handle} was alone on a worker at two crashes and is not tried again"
    )
    assert len(driver.records("quarantined")) == 1


def test_who_was_stopped_itself_does_not_take_its_peers_for_silent(driver: Driver) -> None:
    worker = driver.worker()
    driver.submit()
    driver.tick()
    driver.tick(60.0)
    assert driver.to_gateway(Interrupted) == []
    for _ in range(8):
        driver.tick(1.0)
    assert worker not in driver.core.state.workers


# where they run ---------------------------------------------------------------------------------


def test_half_of_a_group_runs_on_a_worker_and_nobody_joins_it(driver: Driver) -> None:
    worker = driver.worker(slots=64)
    suspects = [suspect(driver, 7) for _ in range(7)]
    driver.submit()
    driver.tick()
    assert driver.grants(worker) == [suspects[:4]]


def test_later_suspects_of_a_group_join_until_it_is_half(driver: Driver) -> None:
    worker = driver.worker(slots=64)
    suspects = []
    for _ in range(5):
        suspects.append(suspect(driver, 6))
        driver.tick()
    suspect(driver, 3)
    driver.tick()
    assert driver.grants(worker) == [[handle] for handle in suspects[:3]]


def test_groups_are_kept_apart(driver: Driver) -> None:
    workers = [driver.worker(name) for name in ("A", "B")]
    sixes, fours = [suspect(driver, 6) for _ in range(2)], [suspect(driver, 4) for _ in range(2)]
    driver.tick()
    assert sorted(driver.grants(workers[0]) + driver.grants(workers[1])) == sorted([sixes, fours])


def test_suspects_of_small_groups_run_alone_on_empty_workers(driver: Driver) -> None:
    workers = [driver.worker(name) for name in ("A", "B")]
    pair = [suspect(driver, 2) for _ in range(2)]
    driver.tick()
    assert sorted(driver.grants(workers[0]) + driver.grants(workers[1])) == [[handle] for handle in pair]


def test_a_suspect_goes_to_the_empty_worker_and_the_others_to_the_rest(driver: Driver) -> None:
    busy = driver.worker("busy")
    driver.submit()
    driver.tick()
    empty = driver.worker("empty")
    lonely, ordinary = suspect(driver, 1), driver.submit()
    driver.tick()
    assert driver.grants(empty) == [[lonely]]
    assert driver.grants(busy)[1:] == [[ordinary]]


# how they are cleared ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["tokens", "end", "time", "cancel"])
def test_when_its_suspects_are_cleared_a_worker_is_open_to_everybody(driver: Driver, how: str) -> None:
    worker = driver.worker()
    handle = suspect(driver, 1, generated=(5, 5), generated_counts=(2,))
    ordinary = driver.submit()
    driver.tick()
    tokens(driver, worker, handle, 2, PROBATION_TOKENS - 1)
    assert driver.grants(worker) == [[handle]]
    if how == "tokens":
        tokens(driver, worker, handle, PROBATION_TOKENS + 1, 1)
    elif how == "end":
        driver.finish(worker, handle)
    elif how == "cancel":
        driver.cancel(handle, attempt=1)
    else:
        for _ in range(11):
            driver.worker_beat(worker)
            driver.gateway_beat()
            driver.tick(1.0)
    driver.tick()
    assert driver.grants(worker) == [[handle], [ordinary]]


def test_tokens_of_another_attempt_clear_nobody(driver: Driver) -> None:
    worker = driver.worker()
    handle = suspect(driver, 1)
    driver.tick()
    tokens(driver, worker, handle, 0, PROBATION_TOKENS, attempt=0)
    assert len(driver.state_of(worker).probation) == 1


# who waits --------------------------------------------------------------------------------------


def reserved(driver: Driver) -> tuple[bytes, bytes, int]:
    """Two busy workers, one of which is kept free for a suspect that must be alone."""
    more, less = driver.worker("more", slots=4), driver.worker("less", slots=8)
    for _ in range(4):
        driver.submit()
    driver.tick()
    handle = suspect(driver, 2)
    driver.tick()
    return more, less, handle


def test_when_no_worker_is_empty_the_one_with_least_is_kept_free(driver: Driver) -> None:
    more, less, handle = reserved(driver)
    ordinary = driver.submit()
    driver.tick()
    assert driver.grants(more)[-1] == [ordinary]
    for key in list(driver.state_of(less).holds):
        driver.finish(less, key.key.handle)
    driver.tick()
    assert driver.grants(less)[-1] == [handle]


def test_what_does_not_end_soon_moves_away_for_a_suspect(driver: Driver) -> None:
    _, less, handle = reserved(driver)
    held = {key.key.handle for key in driver.state_of(less).holds}
    for _ in range(6):
        assert driver.to_gateway(Interrupted) == []
        driver.tick(0.9)
        for worker in driver.core.state.workers:
            driver.worker_beat(worker)
    assert {(i.handle, i.cause, i.suspects) for i in driver.to_gateway(Interrupted)} == {
        (number, "moved", 0) for number in held
    }
    assert {cancel.handle for cancel in driver.to_worker(WorkerCancel, less)} == held
    assert driver.grants(less)[-1] == [handle]


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_worker_is_not_kept_free_for_a_suspect_that_has_ended(driver: Driver, how: str) -> None:
    worker = driver.worker()
    driver.submit()
    driver.tick()
    handle = suspect(driver, 1, milliseconds_left=1000)
    ordinary = driver.submit()
    driver.tick()
    if how == "cancel":
        driver.cancel(handle, attempt=1)
    driver.tick(0.0 if how == "cancel" else 1.5)
    driver.tick()
    assert driver.grants(worker)[-1] == [ordinary]
    driver.tick(2.0)
    assert driver.to_gateway(Interrupted) == []


def test_few_workers_are_kept_free_at_a_time() -> None:
    driver = Driver()
    driver.gateway()
    workers = [driver.worker(f"W{number}", slots=4) for number in range(8)]
    for _ in range(16):
        driver.submit()
    driver.tick()
    for _ in range(5):
        suspect(driver, 1)
    driver.tick()
    assert sum(driver.state_of(worker).reserved is not None for worker in workers) == 2
