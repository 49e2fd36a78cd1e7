"""Who is there and who is lost: hellos, beats, leases, drains, and what becomes of the requests."""

from __future__ import annotations

import msgspec
import pytest
from core_driver import EPOCH, GATEWAY, Driver, card, finished

from sfllm.asset_pull import asset_of
from sfllm.messages import (
    Capacity,
    Drain,
    GatewayBye,
    GatewayHello,
    GatewayWelcome,
    Interrupted,
    Models,
    SchedulerBeat,
    WorkerCancel,
    WorkerDraining,
    WorkerFinished,
    WorkerHello,
    WorkerWelcome,
)
from sfllm_scheduler.core.events import (
    ForgetGateway,
    ForgetWorker,
    FromGateway,
    FromWorker,
    GatewayUnreachable,
    ModelReady,
    NeedAssets,
    WorkerUnreachable,
)


def running_request(driver: Driver) -> tuple[bytes, int]:
    worker = driver.worker()
    handle = driver.submit()
    driver.tick()
    return worker, handle


def test_a_gateway_is_welcomed_and_told_the_models() -> None:
    driver = Driver(beat_seconds=0.5, lease_seconds=1.5)
    driver.worker(model=card("m"))
    driver.gateway()
    assert driver.to_gateway(GatewayWelcome) == [GatewayWelcome(EPOCH, 0.5, 1.5)]
    (models,) = driver.to_gateway(Models)
    assert [(state.card.name, state.workers) for state in models.models] == [("m", 1)]


def test_a_model_is_listed_once_its_assets_are_here(driver: Driver) -> None:
    described = card("m", assets=(asset_of("tokenizer.json", b"{}"),))
    worker = driver.worker(model=described)
    assert NeedAssets(worker, described) in driver.log
    assert driver.to_gateway(Models)[-1].models == ()
    driver.send(ModelReady(card("m", assets=(asset_of("tokenizer.json", b"other"),))))
    assert driver.to_gateway(Models)[-1].models == ()
    driver.send(ModelReady(described))
    assert driver.to_gateway(Models)[-1].models[0].card == described


def test_a_model_without_workers_stays_listed_with_none(driver: Driver) -> None:
    driver.leave(driver.worker())
    assert [state.workers for state in driver.to_gateway(Models)[-1].models] == [0]


def test_every_hello_gets_a_new_lease_and_what_was_held_is_interrupted(driver: Driver) -> None:
    worker, handle = running_request(driver)
    driver.worker()
    first, second = driver.to_worker(WorkerWelcome, worker)
    assert second.lease > first.lease
    assert driver.to_gateway(Interrupted) == [Interrupted(handle, 0, "worker_rejoined", "W1")]
    assert driver.state_of(worker).used_slots == 0


def test_messages_of_an_older_lease_are_dropped(driver: Driver) -> None:
    worker, handle = running_request(driver)
    stale = WorkerFinished(driver.lease(worker), GATEWAY, finished(driver.granted(handle)))
    driver.worker()
    before = len(driver.log)
    driver.send(FromWorker(worker, stale))
    assert [record.event for record in driver.records("dropped")] == ["dropped"]
    assert len(driver.log) == before + 1


def test_beats_go_both_ways_at_their_interval(driver: Driver) -> None:
    worker = driver.worker()
    for _ in range(40):
        driver.tick(0.1)
    assert driver.to_gateway(SchedulerBeat) == [SchedulerBeat(EPOCH)] * 2
    assert driver.to_worker(SchedulerBeat, worker) == [SchedulerBeat(EPOCH)] * 2


def test_a_worker_that_beats_stays_and_one_that_is_silent_is_lost(driver: Driver) -> None:
    worker, handle = running_request(driver)
    for _ in range(5):
        driver.tick(2.0)
        driver.worker_beat(worker)
        driver.gateway_beat()
    assert driver.to_gateway(Interrupted) == []
    for _ in range(4):
        driver.tick(2.0)
        driver.gateway_beat()
    assert driver.to_gateway(Interrupted) == [Interrupted(handle, 0, "silent", "W1", suspects=1)]
    assert ForgetWorker(worker) in driver.log
    assert driver.to_gateway(Models)[-1].models[0].workers == 0


def test_a_silent_gateway_is_forgotten_and_its_requests_are_cancelled(driver: Driver) -> None:
    worker, handle = running_request(driver)
    driver.submit(handle=99, priority=5, model="m")
    for _ in range(4):
        driver.tick(2.0)
        driver.worker_beat(worker)
    assert ForgetGateway(GATEWAY) in driver.log
    assert handle in [cancel.handle for cancel in driver.to_worker(WorkerCancel, worker)]
    assert driver.core.state.waiting_count == 0


@pytest.mark.parametrize("how", ["bye", "unreachable"])
def test_a_gateway_that_leaves_takes_its_requests_along(driver: Driver, how: str) -> None:
    worker, handle = running_request(driver)
    driver.send(FromGateway(GATEWAY, GatewayBye(1)) if how == "bye" else GatewayUnreachable(GATEWAY))
    assert [cancel.handle for cancel in driver.to_worker(WorkerCancel, worker)] == [handle]
    assert GATEWAY not in driver.core.state.gateways


def test_an_unreachable_worker_is_lost_at_once(driver: Driver) -> None:
    worker, handle = running_request(driver)
    driver.send(WorkerUnreachable(worker))
    assert driver.to_gateway(Interrupted) == [Interrupted(handle, 0, "unreachable", "W1", suspects=1)]
    assert driver.send(WorkerUnreachable(worker)) == []


def test_a_gateway_that_says_hello_again_may_submit_its_requests_again(driver: Driver) -> None:
    worker, handle = running_request(driver)
    driver.send(FromGateway(GATEWAY, GatewayHello(1)))
    assert driver.to_gateway(Interrupted) == [Interrupted(handle, 0, "gateway_reconnected", "")]
    driver.submit(handle=handle, attempt=1)
    driver.tick()
    assert driver.granted(handle).attempt == 1
    assert driver.to_worker(WorkerCancel, worker)[0].attempt == 0


def test_a_draining_worker_finishes_what_it_holds_and_gets_nothing_more(driver: Driver) -> None:
    worker, handle = running_request(driver)
    driver.send(FromWorker(worker, WorkerDraining(driver.lease(worker))))
    driver.submit()
    driver.tick()
    assert driver.grants(worker) == [[handle]]
    assert driver.to_gateway(Models)[-1].models[0].workers == 0
    driver.finish(worker, handle)
    driver.leave(worker)
    assert driver.to_gateway(Interrupted) == []


def test_a_worker_that_leaves_with_work_has_it_interrupted(driver: Driver) -> None:
    worker, handle = running_request(driver)
    driver.leave(worker)
    assert driver.to_gateway(Interrupted) == [Interrupted(handle, 0, "drain", "W1")]


def test_a_worker_with_other_content_under_a_served_name_is_told_to_leave(driver: Driver) -> None:
    worker = driver.worker("A", model=card("m", vocab_size=1000))
    other = driver.worker("B", model=card("m", vocab_size=2000))
    assert len(driver.to_worker(Drain, other)) == 1
    handle = driver.submit()
    driver.tick()
    assert driver.grants(worker) == [[handle]]
    driver.leave(worker)
    driver.worker("B", model=card("m", vocab_size=2000))
    assert driver.core.state.models["m"].card.vocab_size == 2000


def test_workers_of_differently_quantized_weights_do_not_serve_one_model(driver: Driver) -> None:
    driver.worker("A", model=card("m"))
    other = driver.worker("B", model=msgspec.structs.replace(card("m"), quantization="int4"))
    assert len(driver.to_worker(Drain, other)) == 1


def test_a_worker_without_capacity_is_not_welcomed(driver: Driver) -> None:
    driver.send(FromWorker(b"w-x", WorkerHello("x", card(), Capacity(0, 100, 100))))
    assert b"w-x" not in driver.core.state.workers
    assert len(driver.records("malformed")) == 1


def test_the_table_of_models_is_bounded(driver: Driver) -> None:
    for number in range(400):
        driver.leave(driver.worker(model=card(f"m{number}")))
    assert len(driver.core.state.models) == 256
    assert "m399" in driver.core.state.models
