"""Which requests go together, to which worker, and who may pass whom."""

from __future__ import annotations

import pytest
from core_driver import Driver, card

from sfllm.bands import BAND_RATIO, band_end, band_of
from sfllm.messages import Interrupted


def test_bands_grow_by_their_ratio_and_hold_every_length() -> None:
    assert band_of(1) == band_of(16) == 0
    assert band_of(17) == 1
    for tokens in range(1, 5000):
        assert tokens <= band_end(band_of(tokens))
        assert band_of(tokens) <= band_of(tokens + 1)
    assert all(band_end(band) < band_end(band + 1) <= band_end(band) * BAND_RATIO + 1 for band in range(30))
    assert band_of(10**9) == band_of(10**10)


@pytest.mark.parametrize("policy", ["length", "auto"])
def test_requests_of_a_band_go_together_and_short_ones_first(policy: str) -> None:
    driver = Driver(policy=policy)
    driver.gateway()
    worker = driver.worker(slots=4, step_tokens=4096)
    long, short, long_too, short_too, _ = (driver.submit(n) for n in (200, 10, 190, 12, 210))
    driver.tick(0.1)
    assert driver.grants(worker) == [[short, short_too], [long, long_too]]


def test_a_long_request_that_has_waited_for_long_goes_before_a_short_one(driver: Driver) -> None:
    worker = driver.worker(slots=1, step_tokens=4096)
    running = driver.submit()
    driver.tick()
    long = driver.submit(1000)
    driver.tick(1.6)
    short = driver.submit(10)
    driver.tick(0.1)
    driver.finish(worker, running)
    driver.tick()
    assert driver.grants(worker)[1] == [long], "1.7 s for 1,064 tokens is more than 0.1 s for 74"
    driver.finish(worker, long)
    driver.tick()
    assert driver.grants(worker)[2] == [short]


@pytest.mark.parametrize("policy", ["length", "auto"])
def test_requests_that_can_still_be_in_time_go_before_those_that_cannot(policy: str) -> None:
    driver = Driver(policy=policy, target_ttft_seconds=1.0)
    driver.gateway()
    worker = driver.worker(slots=1, step_tokens=4096)
    running = driver.submit()
    driver.tick()
    late = driver.submit(10)
    driver.tick(2.0)
    long = driver.submit(1000)
    retry = driver.submit(1000, attempt=1, age_milliseconds=5000)
    order = []
    for _ in range(3):
        driver.finish(worker, running)
        driver.tick()
        ((running,),) = driver.grants(worker)[-1:]
        order.append(running)
    assert order == [retry, long, late], "a retry's client reads already, so it is never late"


def test_an_anchor_that_has_waited_takes_neighbouring_bands_with_it_the_nearest_first(driver: Driver) -> None:
    worker = driver.worker(slots=3, step_tokens=4096)
    running = driver.submit(10, choices=(0, 1, 2))
    driver.tick()
    anchor, far, near, same = (driver.submit(n) for n in (100, 900, 150, 101))
    driver.tick(0.5)
    for choice in range(3):
        driver.finish(worker, running, choice)
    driver.tick()
    assert driver.grants(worker)[1] == [anchor, same, near]
    driver.finish(worker, anchor)
    driver.tick()
    assert driver.grants(worker)[2] == [far]


def test_a_cohort_ends_at_the_step_budget_and_the_next_one_follows(driver: Driver) -> None:
    worker = driver.worker(slots=8, step_tokens=64)
    handles = [driver.submit(30) for _ in range(5)]
    driver.tick()
    assert driver.grants(worker) == [handles[:2], handles[2:4], handles[4:]]


def test_a_prompt_longer_than_the_step_budget_still_goes(driver: Driver) -> None:
    worker = driver.worker(step_tokens=64)
    handle = driver.submit(1000)
    driver.tick()
    assert driver.grants(worker) == [[handle]]


def test_first_come_first_served_takes_requests_in_order_whatever_their_length() -> None:
    driver = Driver(policy="fcfs")
    driver.gateway()
    worker = driver.worker(slots=3, step_tokens=4096)
    handles = [driver.submit(n) for n in (200, 10, 190, 12, 210)]
    driver.tick()
    assert driver.grants(worker) == [handles[:3]]


def test_first_come_first_served_lets_nobody_pass_one_that_does_not_fit_yet() -> None:
    driver = Driver(policy="fcfs")
    driver.gateway()
    worker = driver.worker(kv_tokens=600)
    first, large, small = driver.submit(300), driver.submit(400), driver.submit(10)
    driver.tick()
    assert driver.grants(worker) == [[first]]
    driver.finish(worker, first)
    driver.tick()
    assert driver.grants(worker)[1:] == [[large, small]]


def test_a_higher_priority_goes_first(driver: Driver) -> None:
    worker = driver.worker(slots=1)
    driver.submit(priority=0)
    later = driver.submit(priority=-1)
    driver.tick()
    assert driver.grants(worker) == [[later]]


def test_lower_priorities_fill_what_higher_ones_leave(driver: Driver) -> None:
    worker = driver.worker(slots=3, step_tokens=4096)
    low, lower, high = driver.submit(10), driver.submit(10, priority=5), driver.submit(500, priority=-5)
    driver.tick()
    assert driver.grants(worker) == [[high], [low], [lower]]


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_a_request_is_passed_no_more_often_than_the_bound(bound: int) -> None:
    driver = Driver(max_overtakes=bound)
    driver.gateway()
    worker = driver.worker(slots=1, kv_tokens=600)
    first = driver.submit(10)
    driver.tick()
    anchor = driver.submit(100)
    waiting = driver.submit(3000 // 8)  # another band than everything that follows
    others = [driver.submit(100) for _ in range(8)]
    order = []
    for handle in [first, anchor]:
        driver.finish(worker, handle)
        driver.tick()
    while driver.state_of(worker).holds:
        (key,) = driver.state_of(worker).holds
        order.append(key.key.handle)
        driver.finish(worker, key.key.handle)
        driver.tick()
    assert order.index(waiting) <= bound
    assert set(order) == {waiting, *others}


def test_requests_that_fit_pass_a_large_one_until_the_bound_and_then_wait_for_it() -> None:
    driver = Driver(max_overtakes=2)
    driver.gateway()
    worker = driver.worker(slots=8, kv_tokens=600)
    running = driver.submit(300)
    driver.tick()
    large = driver.submit(400)
    small = [driver.submit(10) for _ in range(4)]
    driver.tick()
    assert driver.grants(worker) == [[running], small[:2]]
    for handle in (running, *small[:2]):
        driver.finish(worker, handle)
    driver.tick()
    assert driver.grants(worker)[2:] == [[large], small[2:]]


def test_a_burst_is_spread_over_workers(driver: Driver) -> None:
    workers = [driver.worker(name, slots=8) for name in ("A", "B")]
    for _ in range(6):
        driver.submit(20)
    driver.tick()
    assert [sum(map(len, driver.grants(worker))) for worker in workers] == [3, 3]


def test_the_less_loaded_worker_is_chosen(driver: Driver) -> None:
    busy = driver.worker("A", slots=4)
    driver.submit()
    driver.tick()
    idle = driver.worker("B", slots=4)
    handle = driver.submit()
    driver.tick()
    assert driver.grants(idle) == [[handle]]
    assert len(driver.grants(busy)) == 1


def test_a_retry_avoids_its_last_worker_while_another_has_room(driver: Driver) -> None:
    last = driver.worker("last", slots=8)
    driver.submit(gateway=b"g-1")
    driver.tick()
    other = driver.worker("other", slots=8)
    for _ in range(5):
        driver.submit()
    driver.tick()
    before = len(driver.grants(other))
    handle = driver.submit(attempt=1, last_worker="other")
    driver.tick()
    assert driver.grants(last)[-1] == [handle]
    assert len(driver.grants(other)) == before


def test_a_retry_goes_to_its_last_worker_when_no_other_has_room(driver: Driver) -> None:
    worker = driver.worker("only")
    handle = driver.submit(attempt=1, last_worker="only")
    driver.tick()
    assert driver.grants(worker) == [[handle]]


def test_a_retried_request_keeps_its_place(driver: Driver) -> None:
    worker = driver.worker(slots=1)
    first, _second = driver.submit(), driver.submit()
    driver.tick()
    driver.leave(worker)
    assert [i.handle for i in driver.to_gateway(Interrupted)] == [first]
    driver.now += 1.0
    driver.submit(handle=first, attempt=1)
    worker = driver.worker("W2", slots=1)
    driver.tick()
    assert driver.grants(worker) == [[first]]


def test_a_choice_takes_a_slot_and_its_reserve(driver: Driver) -> None:
    worker = driver.worker(slots=4, kv_tokens=1000)
    driver.submit(100, choices=(0, 1, 2), max_tokens=50)
    driver.tick()
    assert driver.state_of(worker).used_slots == 3
    assert driver.state_of(worker).used_kv_tokens == 100 + 3 * 50


def test_models_have_queues_of_their_own(driver: Driver) -> None:
    one = driver.worker("A", slots=1, model=card("one"))
    two = driver.worker("B", slots=1, model=card("two"))
    first, _ = driver.submit(model="one"), driver.submit(model="one")
    other = driver.submit(model="two")
    driver.tick()
    assert (driver.grants(one), driver.grants(two)) == ([[first]], [[other]])


def test_the_bound_is_for_each_worker_that_serves_the_model() -> None:
    driver = Driver(max_overtakes=1)
    driver.gateway()
    worker = driver.worker("one", slots=8, kv_tokens=600)
    running = driver.submit(300)
    driver.tick()
    driver.submit(400)
    small = [driver.submit(10) for _ in range(6)]
    driver.tick()
    assert driver.grants(worker) == [[running], small[:1]]
    for name in ("two", "three"):
        driver.worker(name, kv_tokens=5)  # too small for any of these
    driver.tick()
    assert driver.grants(worker) == [[running], small[:1], small[1:3]]


def test_a_request_behind_one_that_cannot_run_here_is_still_not_passed_too_often() -> None:
    driver = Driver(max_overtakes=1)  # for each of two workers
    driver.gateway()
    driver.worker("large", slots=1, kv_tokens=4000)
    small = driver.worker("small", slots=8, kv_tokens=600)
    driver.submit(1000)
    driver.tick()
    running = driver.submit(300)
    driver.tick()
    driver.submit(1000)
    middle = driver.submit(400)
    others = [driver.submit(10) for _ in range(4)]
    driver.tick()
    assert driver.grants(small) == [[running], others[:2]]
    for handle in (running, *others[:2]):
        driver.finish(small, handle)
    driver.tick()
    assert driver.grants(small)[2:] == [[middle], others[2:]]
