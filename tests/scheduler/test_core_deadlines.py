"""Requests whose slack is nearly gone go first, those that cannot make it do not push others aside."""

from __future__ import annotations

import pytest
from core_driver import GATEWAY, Driver, finished
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sfllm.messages import Sampling, Submit, Timings, WorkerFinished
from sfllm.wire import as_array
from sfllm_scheduler.core.events import FromWorker
from sfllm_scheduler.core.requests import Key, Rank, Request
from sfllm_scheduler.core.urgency import NEARLY_GONE_SECONDS, Pressed


def busy_driver(policy: str = "auto", **values: object) -> tuple[Driver, bytes, int]:
    """A driver whose only worker runs one request and takes no other beside it."""
    driver = Driver(policy=policy, lease_seconds=1e6, **values)
    driver.gateway()
    worker = driver.worker(slots=1)
    running = driver.submit()
    driver.tick()
    return driver, worker, running


def order(driver: Driver, worker: bytes, running: int, count: int) -> list[int]:
    """What is granted next, so often, each time that the one before has ended."""
    granted = []
    for _ in range(count):
        driver.finish(worker, running)
        driver.tick()
        ((running,),) = driver.grants(worker)[-1:]
        granted.append(running)
    return granted


@pytest.mark.parametrize("policy", ["length", "prefix", "auto"])
def test_a_request_that_must_start_now_goes_first_and_the_earliest_of_several(policy: str) -> None:
    driver, worker, running = busy_driver(policy)
    patient = driver.submit(10)
    driver.tick(3.0)
    soon = driver.submit(400, milliseconds_left=1900)
    sooner = driver.submit(400, milliseconds_left=1800)
    assert order(driver, worker, running, 3) == [sooner, soon, patient]


def test_first_come_first_served_knows_no_urgency() -> None:
    driver, worker, running = busy_driver("fcfs")
    patient = driver.submit(10)
    hurried = driver.submit(10, milliseconds_left=1000)
    assert order(driver, worker, running, 2) == [patient, hurried]


def test_a_request_becomes_urgent_when_time_passes() -> None:
    driver, worker, running = busy_driver()
    first = driver.submit(10)
    driver.tick(1.0)
    late = driver.submit(500, milliseconds_left=10_000)
    driver.tick(8.5)
    assert order(driver, worker, running, 2) == [late, first]


def test_what_cannot_be_ready_in_time_any_more_pushes_nobody_aside() -> None:
    driver, worker, running = busy_driver()
    entry = driver.granted(running)
    end = replace(finished(entry), generated_tokens=10, timings=Timings(0.0, 1.0, 20.0))  # 2 s a token
    driver.send(FromWorker(worker, WorkerFinished(driver.lease(worker), GATEWAY, end)))
    running = driver.submit()
    driver.tick()
    first = driver.submit(10)
    driver.tick(1.0)
    hopeless = driver.submit(500, milliseconds_left=10_000, max_tokens=100)
    assert order(driver, worker, running, 2) == [first, hopeless]


def test_urgent_requests_pass_others_no_more_often_than_the_bound() -> None:
    driver, worker, running = busy_driver(max_overtakes=2)
    patient = driver.submit(10)
    driver.tick(1.0)
    urgent = [driver.submit(10, milliseconds_left=1500) for _ in range(4)]
    assert order(driver, worker, running, 4) == [*urgent[:2], patient, urgent[2]]


def request(number: int, latest_start: float) -> Request:
    submit = Submit(f"r{number}", number, 0, "m", (0,), (0,), Sampling(8, 1), 0, 1000)
    arrays = (as_array("I", [1]), as_array("I", ()), as_array("Q", ()))
    made = Request(Key(GATEWAY, number), submit, arrays, "m", Rank(0.0, number), 0.0)
    made.latest_start = latest_start
    return made


@given(starts=st.lists(st.floats(0, 100), max_size=30), leaving=st.sets(st.integers(0, 29)), data=st.data())
def test_the_urgent_ones_are_those_that_can_still_start_and_must_soon(
    starts: list[float], leaving: set[int], data: st.DataObject
) -> None:
    pressed = Pressed()
    requests = [request(number, start) for number, start in enumerate(starts)]
    for each in requests:
        pressed.add(each)
    now = 0.0
    left = set(requests)
    for number in sorted(leaving & set(range(len(requests)))):
        now += data.draw(st.floats(0, 10))
        pressed.discard(requests[number])
        left.discard(requests[number])
        due = [each for each in left if now <= each.latest_start <= now + NEARLY_GONE_SECONDS]
        assert list(pressed.urgent(now)) == sorted(due, key=lambda each: (each.latest_start, each.rank))


def test_requests_that_have_left_do_not_stay_in_memory() -> None:
    pressed = Pressed()
    for number in range(5000):
        one = request(number, 1e9)
        pressed.add(one)
        pressed.discard(one)
    assert pressed.stored < 100
