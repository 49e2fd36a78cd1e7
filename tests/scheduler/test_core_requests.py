"""The life of a request in the core: admitted, granted, ended; once each, whatever is repeated or lost."""

from __future__ import annotations

import pytest
from core_driver import EPOCH, GATEWAY, Driver, card, lists

from sfllm.errors import ErrorCode
from sfllm.messages import (
    Admitted,
    Finished,
    GatewayWelcome,
    Grant,
    Interrupted,
    Models,
    Rejected,
    Sampling,
    Submit,
    Tokens,
    WorkerCancel,
    WorkerFault,
    WorkerTokens,
)
from sfllm.token_batch import TokenBatch
from sfllm.wire import as_array
from sfllm_scheduler.core.events import FromGateway, FromWorker, ToGateway


def test_a_request_is_admitted_granted_with_its_tokens_and_finished_once(driver: Driver) -> None:
    worker = driver.worker()
    handle = driver.submit(3, generated=(7, 8), generated_counts=(2,))
    assert driver.to_gateway(Admitted) == [Admitted(handle, 0)]
    driver.tick(1.5)
    grant = next(a for a in driver.log if getattr(a, "message", None).__class__ is Grant)
    assert lists(grant.arrays) == [[0, 1, 2], [7, 8], []]
    (entry,) = grant.message.requests
    assert (entry.gateway, entry.request_id, entry.prompt_count, entry.generated_counts) == (
        GATEWAY,
        "r1",
        3,
        (2,),
    )
    assert entry.queue_seconds == 1.5
    driver.finish(worker, handle)
    driver.finish(worker, handle)
    assert len(driver.to_gateway(Finished)) == 1
    assert driver.state_of(worker).used_slots == driver.state_of(worker).used_kv_tokens == 0


def test_token_arrays_are_relayed_as_they_are(driver: Driver) -> None:
    worker = driver.worker()
    batch = TokenBatch()
    batch.append(1, 0, 0, 0, [5, 6])
    arrays = batch.arrays()
    (action,) = driver.send(FromWorker(worker, WorkerTokens(driver.lease(worker), GATEWAY), arrays))
    assert isinstance(action, ToGateway)
    assert action.message == Tokens()
    assert all(sent is given for sent, given in zip(action.arrays, arrays, strict=True))


def test_tokens_for_a_gateway_that_left_and_arrays_that_do_not_add_up_are_dropped(driver: Driver) -> None:
    worker = driver.worker()
    batch = TokenBatch()
    batch.append(1, 0, 0, 0, [5, 6])
    lease = driver.lease(worker)
    assert driver.send(FromWorker(worker, WorkerTokens(lease, b"g-gone"), batch.arrays())) == []
    handles, integers, logprobs = batch.arrays()
    broken = (handles, integers[:-1], logprobs)
    driver.send(FromWorker(worker, WorkerTokens(lease, GATEWAY), broken))
    assert driver.to_gateway(Tokens) == []
    assert len(driver.records("malformed")) == 1


def test_the_same_submit_again_is_acknowledged_again_and_runs_once(driver: Driver) -> None:
    worker = driver.worker()
    handle = driver.submit()
    driver.submit(handle=handle)
    driver.tick()
    driver.submit(handle=handle)
    driver.tick()
    assert driver.to_gateway(Admitted) == [Admitted(handle, 0)] * 3
    assert driver.grants(worker) == [[handle]]


def test_an_older_attempt_is_ignored(driver: Driver) -> None:
    driver.worker()
    handle = driver.submit(attempt=2)
    driver.submit(handle=handle, attempt=1)
    assert driver.to_gateway(Admitted) == [Admitted(handle, 2)]


def test_a_newer_attempt_cancels_the_older_one_at_its_worker(driver: Driver) -> None:
    worker = driver.worker()
    handle = driver.submit()
    driver.tick()
    driver.submit(handle=handle, attempt=1)
    driver.tick()
    (cancel,) = driver.to_worker(WorkerCancel, worker)
    assert (cancel.handle, cancel.attempt) == (handle, 0)
    assert driver.granted(handle).attempt == 1


def test_a_repeat_of_what_has_ended_is_not_run_again_but_may_be_retried(driver: Driver) -> None:
    worker = driver.worker()
    handle = driver.submit()
    driver.tick()
    driver.finish(worker, handle)
    driver.submit(handle=handle)
    driver.tick()
    assert driver.grants(worker) == [[handle]]
    assert driver.to_gateway(Interrupted) == [Interrupted(handle, 0, "already_ended", "")]


def test_credits_return_when_the_last_choice_has_finished(driver: Driver) -> None:
    worker = driver.worker(slots=4)
    handle = driver.submit(10, choices=(0, 1, 2))
    driver.tick()
    for choice in (2, 0):
        driver.finish(worker, handle, choice)
    assert driver.state_of(worker).used_slots == 3
    driver.finish(worker, handle, 1)
    assert driver.state_of(worker).used_slots == 0
    assert [end.choice for end in driver.to_gateway(Finished)] == [2, 0, 1]


def test_a_fault_ends_the_request_with_its_reason(driver: Driver) -> None:
    worker = driver.worker()
    handle = driver.submit()
    driver.tick()
    lease = driver.lease(worker)
    driver.send(FromWorker(worker, WorkerFault(lease, GATEWAY, handle, 0, ErrorCode.NOT_SUPPORTED, "no")))
    assert driver.to_gateway(Rejected) == [Rejected(handle, 0, ErrorCode.NOT_SUPPORTED, "no")]
    assert driver.state_of(worker).used_slots == 0


def test_an_unknown_fault_code_reaches_the_gateway_as_an_engine_failure(driver: Driver) -> None:
    worker = driver.worker()
    handle = driver.submit()
    driver.tick()
    driver.send(FromWorker(worker, WorkerFault(driver.lease(worker), GATEWAY, handle, 0, "nonsense", "no")))
    assert driver.to_gateway(Rejected)[0].code == ErrorCode.ENGINE_FAILURE


# refusals -------------------------------------------------------------------------------------


def test_a_full_queue_is_said_with_the_time_to_come_back() -> None:
    driver = Driver(max_queue_requests=2)
    driver.gateway()
    driver.worker(slots=1)
    driver.submit()
    driver.tick()
    handles = [driver.submit() for _ in range(3)]
    (rejected,) = driver.to_gateway(Rejected)
    assert (rejected.handle, rejected.code) == (handles[-1], ErrorCode.QUEUE_FULL)
    assert rejected.retry_after_seconds is not None
    assert 1 <= rejected.retry_after_seconds <= 60


def test_the_time_to_come_back_follows_the_measured_drain_rate() -> None:
    def retry_after(seconds_each: float) -> float:
        driver = Driver(max_queue_requests=50, lease_seconds=1e6)
        driver.gateway()
        worker = driver.worker(slots=1)
        handles = [driver.submit() for _ in range(50)]
        for handle in handles[:40]:
            driver.tick()
            driver.now += seconds_each
            driver.finish(worker, handle)
        while not driver.to_gateway(Rejected):
            driver.submit()
        return driver.to_gateway(Rejected)[0].retry_after_seconds or 0.0

    fast, slow = retry_after(0.1), retry_after(0.8)
    assert 3 <= fast <= 10  # 50 requests at 10 a second
    assert 25 <= slow <= 60  # 50 requests at 1.25 a second


def test_a_retry_passes_the_bound_of_the_queue() -> None:
    driver = Driver(max_queue_requests=1)
    driver.gateway()
    driver.worker(slots=1)
    driver.submit()
    driver.tick()
    driver.submit()
    retried = driver.submit(attempt=1)
    assert Admitted(retried, 1) in driver.to_gateway(Admitted)


def test_a_young_scheduler_waits_for_the_workers_of_a_model_that_it_does_not_know_yet(driver: Driver) -> None:
    early = driver.submit(model="coming")
    assert driver.to_gateway(Rejected) == []
    assert all(message.models == () for message in driver.to_gateway(Models)), "nobody serves it yet"
    worker = driver.worker(model=card("coming"))
    driver.tick()
    assert driver.grants(worker) == [[early]]
    driver.tick(3 * driver.core.state.policy.lease_seconds)
    driver.gateway()
    assert driver.submit(model="retried", attempt=1)
    driver.submit(model="retried")
    assert [rejected.code for rejected in driver.to_gateway(Rejected)] == [ErrorCode.MODEL_NOT_FOUND]


def test_an_unknown_model_is_not_found_and_an_alias_is(driver: Driver) -> None:
    worker = driver.worker(model=card(aliases=("nick",)))
    driver.submit(model="x" * 1000)
    (rejected,) = driver.to_gateway(Rejected)
    assert rejected.code == ErrorCode.MODEL_NOT_FOUND
    assert len(rejected.message) < 300
    handle = driver.submit(model="nick")
    driver.tick()
    assert driver.grants(worker) == [[handle]]


def test_more_choices_than_a_worker_runs_at_once_take_the_whole_worker(driver: Driver) -> None:
    worker = driver.worker(slots=8)
    first = driver.submit(10, choices=tuple(range(20)), max_tokens=4)
    driver.tick()
    assert driver.granted(first).choices == tuple(range(20))
    driver.submit(10)
    driver.tick()
    assert driver.grants(worker) == [[first]], "no slot is left"


@pytest.mark.parametrize(
    ("tokens", "changes", "code"),
    [
        (4096, {}, ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (500, {}, ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        (0, {}, ErrorCode.INVALID_REQUEST),
        (10, {"choices": ()}, ErrorCode.INVALID_REQUEST),
        (10, {"choices": (0, 0)}, ErrorCode.INVALID_REQUEST),
        (10, {"choices": (-1,)}, ErrorCode.INVALID_REQUEST),
        (10, {"generated_counts": (3,)}, ErrorCode.INVALID_REQUEST),
        (10, {"generated_counts": (-1,)}, ErrorCode.INVALID_REQUEST),
        (10, {"handle": -5}, ErrorCode.INVALID_REQUEST),
        (10, {"attempt": -1}, ErrorCode.INVALID_REQUEST),
        (10, {"max_tokens": 0}, ErrorCode.INVALID_REQUEST),
    ],
)
def test_what_no_worker_could_run_is_refused_at_once(
    driver: Driver, tokens: int, changes: dict[str, object], code: ErrorCode
) -> None:
    driver.worker(slots=8, kv_tokens=500)
    driver.submit(tokens, **changes)
    (rejected,) = driver.to_gateway(Rejected)
    assert rejected.code == code
    assert driver.core.state.waiting_count == 0


def test_a_request_larger_than_its_reserve_runs_alone_when_it_fits_the_cache(driver: Driver) -> None:
    worker = driver.worker(kv_tokens=500)
    handle = driver.submit(450, max_tokens=400)
    driver.tick()
    assert driver.grants(worker) == [[handle]]
    assert driver.state_of(worker).free_kv_tokens == 0


# strangers ------------------------------------------------------------------------------------


def test_a_gateway_that_is_not_known_is_told_who_this_scheduler_is() -> None:
    driver = Driver()
    driver.worker()
    submit = Submit("r", 1, 0, "m", (0,), (0,), Sampling(8, 1), 0, 1000)
    (welcome,) = driver.send(FromGateway(b"g-x", submit, (as_array("I", [1]), as_array("I", []))))
    assert isinstance(welcome, ToGateway)
    assert welcome.message == GatewayWelcome(EPOCH, 2.0, 6.0)
    assert driver.core.state.waiting_count == 0


def test_memory_does_not_grow_with_finished_requests() -> None:
    driver = Driver(lease_seconds=1.0)
    driver.gateway()
    worker = driver.worker(slots=64)
    for _ in range(300):
        handle = driver.submit()
        driver.tick(0.05)
        driver.finish(worker, handle)
        driver.worker_beat(worker)
        driver.gateway_beat()
    state = driver.core.state
    assert state.deadlines.stored <= 2 * 64 + 2
    assert len(state.recent) <= 2.0 / 0.05 + 10
    for _ in range(30):
        driver.tick(0.1)
        driver.worker_beat(worker)
        driver.gateway_beat()
    assert len(state.recent) == 0
    assert not state.gateways[GATEWAY].requests
    assert not state.models["m"].waiting.classes
