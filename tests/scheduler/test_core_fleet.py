"""Which worker a request goes to: by what it still has to prefill, its speed, its cache and its room."""

from __future__ import annotations

import math

import pytest
from core_driver import GATEWAY, Driver

from sfllm.messages import Admitted, Interrupted, WorkerWelcome

NAMES = list(range(1, 9))
FAST = (0.001, 1e-5, 1e-4, 1e-8)
SLOW = (0.01, 1e-3, 1e-3, 1e-7)


def place_of(driver: Driver, handle: int) -> str:
    """The worker that the request was granted to."""
    request = driver.core.state.gateways[GATEWAY].requests[handle]
    return request.worker.decode() if request.worker is not None else ""


def place(driver: Driver, tokens: int = 10, **changes: object) -> str:
    """The worker that a new request is granted to at once, empty if it waits."""
    handle = driver.submit(tokens, **changes)
    driver.tick()
    return place_of(driver, handle)


def test_a_worker_gets_requests_until_two_steps_of_prefill_are_outstanding(driver: Driver) -> None:
    worker = driver.worker(slots=8, step_tokens=100)
    handles = [driver.submit(100) for _ in range(4)]
    driver.tick()
    assert driver.all_granted(worker) == handles[:2], "the rest of the queue can still change its order"
    driver.progress(worker, 100)
    driver.tick()
    assert driver.all_granted(worker) == handles[:3]


def test_a_long_prompt_counts_as_one_step_because_others_are_computed_beside_it(driver: Driver) -> None:
    worker = driver.worker(slots=8, step_tokens=100)
    handles = [driver.submit(3000), driver.submit(10)]
    driver.tick()
    assert sorted(driver.all_granted(worker)) == handles


def test_progress_that_does_not_know_the_last_grant_leaves_that_outstanding(driver: Driver) -> None:
    worker = driver.worker(slots=8, step_tokens=100)
    first, _second, third = (driver.submit(100) for _ in range(3))
    driver.tick()
    driver.progress(worker, 100, grants=1)
    driver.tick()
    assert driver.state_of(worker).prefill.tokens == 200
    assert not place_of(driver, third)
    driver.finish(worker, first)
    driver.tick()
    assert place_of(driver, third)


def test_a_worker_that_never_tells_its_progress_is_served_as_its_requests_end(driver: Driver) -> None:
    worker = driver.worker(slots=8, step_tokens=100)
    handles = [driver.submit(100) for _ in range(6)]
    for handle in handles:
        driver.tick()
        driver.finish(worker, handle)
    assert driver.all_granted(worker) == handles


@pytest.mark.parametrize(("grants", "pending"), [(-1, 5), (9, 5), (1, -5), (2**62, 2**62)])
def test_progress_that_cannot_be_is_counted_and_ignored(driver: Driver, grants: int, pending: int) -> None:
    worker = driver.worker()
    driver.submit(10)
    driver.tick()
    driver.progress(worker, pending, grants)
    assert [record.fields["link"] for record in driver.records("malformed")] == ["worker"]
    assert driver.state_of(worker).prefill.tokens == 10


def test_the_worker_with_less_to_prefill_is_chosen(driver: Driver) -> None:
    driver.worker("W1")
    driver.worker("W2")
    assert place(driver, 400) == "w-W1"
    assert place(driver, 10) == "w-W2"
    assert place(driver, 10) == "w-W2"


def test_a_faster_worker_is_given_more(driver: Driver) -> None:
    slow, fast = driver.worker("slow", slots=16), driver.worker("fast", slots=16)
    driver.worker_beat(slow, step_curve=SLOW)
    driver.worker_beat(fast, step_curve=FAST)
    places = [place(driver, 50) for _ in range(8)]
    assert places.count("w-fast") >= 6


@pytest.mark.parametrize("curve", [(math.nan,) * 4, (-1.0,) * 4, (math.inf,) * 4, (1e300,) * 4, (0.1,) * 9])
def test_a_step_curve_that_cannot_be_counts_as_unknown(driver: Driver, curve: tuple[float, ...]) -> None:
    worker, other = driver.worker("W1"), driver.worker("W2")
    driver.worker_beat(worker, step_curve=curve)
    assert driver.state_of(worker).speed == driver.state_of(other).speed
    assert place(driver) == "w-W1"


def test_a_request_goes_to_the_worker_that_has_its_beginning(driver: Driver) -> None:
    driver.worker("W1")
    holder = driver.worker("W2")
    driver.worker_beat(holder, names=NAMES[:3])
    assert place(driver, 520, names=NAMES) == "w-W2"


def test_grants_count_at_once_so_that_like_prompts_follow_each_other(driver: Driver) -> None:
    names = [f"W{number}" for number in range(4)]
    workers = [driver.worker(name, slots=16, kv_tokens=65536, step_tokens=2048) for name in names]
    first = place(driver, 520, names=NAMES)
    for worker in workers:
        driver.progress(worker)
    assert place(driver, 520, names=NAMES) == first


def test_a_worker_that_holds_the_beginning_but_is_too_busy_is_passed_over(driver: Driver) -> None:
    driver.worker("W1", slots=16, step_tokens=2048)
    holder = driver.worker("W2", slots=16, step_tokens=2048)
    driver.worker_beat(holder, names=NAMES[:1])
    state = driver.state_of(holder)
    assert place(driver, 2000, names=NAMES[:1]) == "w-W2"
    assert state.prefill.tokens == 2000 - 64
    assert place(driver, 100, names=NAMES[:1]) == "w-W1"


def test_a_worker_that_starts_over_has_nothing_in_its_cache(driver: Driver) -> None:
    driver.worker("W1")
    holder = driver.worker("W2")
    driver.worker_beat(holder, names=NAMES)
    driver.worker("W2")
    assert place(driver, 520, names=NAMES) == "w-W1"


def test_policies_without_prefixes_choose_by_load_alone() -> None:
    driver = Driver(policy="length")
    driver.gateway()
    driver.worker("W1")
    holder = driver.worker("W2")
    driver.worker_beat(holder, names=NAMES)
    assert place(driver, 520, names=NAMES) == "w-W1"


@pytest.mark.parametrize(("policy", "told"), [("fcfs", False), ("auto", True)])
def test_workers_are_told_whether_short_prompts_go_first(policy: str, told: bool) -> None:
    driver = Driver(policy=policy)
    assert driver.to_worker(WorkerWelcome, driver.worker())[-1].shortest_first is told


def test_a_worker_that_takes_fewer_sequences_than_it_holds_waits_until_enough_ended(
    driver: Driver,
) -> None:
    worker = driver.worker(slots=4)
    handles = [driver.submit() for _ in range(4)]
    driver.tick()
    driver.worker_beat(worker, slots=2)
    waiting = driver.submit()
    for handle in handles[:3]:
        driver.tick()
        assert not place_of(driver, waiting)
        driver.finish(worker, handle)
    driver.tick()
    assert place_of(driver, waiting) == "w-W1"


def test_choices_that_took_turns_count_all_when_a_worker_takes_more_sequences_again(driver: Driver) -> None:
    worker = driver.worker(slots=4)
    driver.worker_beat(worker, slots=2)
    three = driver.submit(choices=(0, 1, 2), generated_counts=(0, 0, 0))
    driver.tick()
    assert driver.state_of(worker).used_slots == 2
    driver.worker_beat(worker, slots=4)
    two, one = driver.submit(choices=(0, 1), generated_counts=(0, 0)), driver.submit()
    driver.tick()
    assert driver.state_of(worker).used_slots == 4
    assert driver.grants(worker) == [[three], [one]]
    assert driver.core.state.waiting_count == 1, f"{two} waits"


@pytest.mark.parametrize("slots", [-(2**63), 2**63])
def test_a_senseless_number_of_slots_does_no_harm(driver: Driver, slots: int) -> None:
    worker = driver.worker(kv_tokens=600)
    driver.worker_beat(worker, slots=slots)
    handles = [driver.submit(200) for _ in range(8)]
    driver.tick()
    assert 0 < len(driver.all_granted(worker)) < len(handles), "its cache still counts"


def test_a_request_that_fits_only_where_others_did_not_is_granted_when_it_comes(driver: Driver) -> None:
    worker = driver.worker(slots=4, kv_tokens=600)
    driver.submit(400)
    driver.tick()
    large = driver.submit(500)
    driver.tick()
    assert not place_of(driver, large)
    assert place(driver, 20) == "w-W1"
    assert len(driver.grants(worker)) == 2


def test_what_waited_is_granted_when_the_one_that_could_not_be_passed_is_cancelled() -> None:
    driver = Driver(max_overtakes=0)
    driver.gateway()
    driver.worker(slots=4, kv_tokens=600)
    driver.submit(400)
    driver.tick()
    large, small = driver.submit(500), driver.submit(20)
    driver.tick()
    assert not place_of(driver, small)
    driver.cancel(large)
    driver.tick()
    assert place_of(driver, small) == "w-W1"


def test_a_retried_request_goes_to_its_last_worker_only_if_there_is_no_other(
    driver: Driver,
) -> None:
    driver.worker("W1")
    other = driver.worker("W2")
    retried = {"attempt": 1, "last_worker": "W1"}
    assert place(driver, **retried) == "w-W2"
    driver.leave(other)
    assert place(driver, **retried) == "w-W1"
    assert len(driver.to_gateway(Admitted)) == 2
    assert driver.to_gateway(Interrupted)
