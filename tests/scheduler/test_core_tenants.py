"""Tenants get their shares of what is served, whatever they submit, and one tenant alone notices nothing."""

from __future__ import annotations

import pytest
from core_driver import Driver
from hypothesis import given, settings
from hypothesis import strategies as st

from sfllm_scheduler.core.tenants import FAIRNESS_TOKENS, MAX_TENANTS, Tenants


def served_by_tenant(driver: Driver, worker: bytes, owners: dict[int, str], rounds: int) -> dict[str, int]:
    """Requests of each tenant that end in so many rounds, in which all that runs ends."""
    served = dict.fromkeys(owners.values(), 0)
    for _ in range(rounds):
        driver.tick(0.1)
        for key in list(driver.state_of(worker).holds):
            served[owners[key.key.handle]] += 1
            driver.finish(worker, key.key.handle)
    return served


def crowd(driver: Driver, **requests: int) -> dict[int, str]:
    """So many equal requests of each tenant, those of one after those of the other."""
    return {
        driver.submit(500, tenant=tenant, max_tokens=100): tenant
        for tenant, count in requests.items()
        for _ in range(count)
    }


def fair_driver(**policy: object) -> Driver:
    driver = Driver(max_overtakes=1000, lease_seconds=1e6, **policy)
    driver.gateway()
    return driver


def test_a_tenant_that_floods_the_queue_does_not_push_others_aside() -> None:
    driver = fair_driver()
    worker = driver.worker(slots=2, kv_tokens=10_000)
    owners = crowd(driver, flood=200, other=60)
    served = served_by_tenant(driver, worker, owners, rounds=60)
    assert served["other"] >= 45, "half of 120, but for what tenants may be apart"


def test_shares_follow_the_weights() -> None:
    driver = fair_driver(tenant_weights=(("heavy", 3.0),))
    worker = driver.worker(slots=2, kv_tokens=10_000)
    owners = crowd(driver, light=300, heavy=300)
    served_by_tenant(driver, worker, owners, rounds=60)
    served = served_by_tenant(driver, worker, owners, rounds=100)
    assert 2.7 <= served["heavy"] / served["light"] <= 3.3


def test_first_come_first_served_knows_no_tenants() -> None:
    driver = fair_driver(policy="fcfs")
    worker = driver.worker(slots=2, kv_tokens=10_000)
    owners = crowd(driver, flood=100, other=20)
    assert served_by_tenant(driver, worker, owners, rounds=50) == {"flood": 100, "other": 0}


def test_a_tenant_that_was_away_does_not_catch_up_on_what_it_did_not_ask_for() -> None:
    driver = fair_driver()
    worker = driver.worker(slots=1, kv_tokens=10_000)
    owners = crowd(driver, busy=150)
    served_by_tenant(driver, worker, owners, rounds=100)
    owners |= crowd(driver, back=60)
    served = served_by_tenant(driver, worker, owners, rounds=40)
    assert served["busy"] >= 8, "the other one goes first for a while, but not until it had as much"


def test_what_requests_really_used_counts_in_the_end() -> None:
    driver = fair_driver()
    worker = driver.worker(slots=1)
    handle = driver.submit(100, tenant="t", max_tokens=1000)
    driver.tick()
    tenants = driver.core.state.models["m"].waiting.tenants
    assert tenants.served("t") == 100 + 2 * 128, "the output as expected before anything is known"
    driver.finish(worker, handle)
    assert tenants.served("t") == 100 + 2 * 1


def test_an_attempt_that_was_lost_is_not_charged() -> None:
    driver = fair_driver()
    worker = driver.worker(slots=1)
    driver.submit(100, tenant="t")
    driver.tick()
    driver.leave(worker)
    assert driver.core.state.models["m"].waiting.tenants.served("t") == 0.0


def test_a_worker_does_not_idle_because_only_a_tenant_that_is_ahead_has_anything_for_it() -> None:
    driver = fair_driver()
    driver.worker("large", slots=1, kv_tokens=20_000)
    small = driver.worker("small", slots=1, kv_tokens=400)
    owners = {driver.submit(300, tenant="ahead"): "ahead" for _ in range(100)}
    served_by_tenant(driver, small, owners, rounds=40)
    owners |= {driver.submit(1000, tenant="behind"): "behind" for _ in range(5)}
    for _ in range(5):
        driver.tick(0.1)
        assert driver.state_of(small).holds
        for key in list(driver.state_of(small).holds):
            driver.finish(small, key.key.handle)


@pytest.mark.parametrize("count", [10, MAX_TENANTS + 500])
def test_memory_of_tenants_is_bounded(count: int) -> None:
    tenants = Tenants({})
    for number in range(count):
        tenants.lift(f"t{number}", None)
    assert len(tenants) == min(count, MAX_TENANTS)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3000)), min_size=1, max_size=80),
    slots=st.integers(1, 3),
)
def test_two_tenants_that_always_wait_are_never_served_much_more_than_each_other(
    sizes: list[tuple[int, int]], slots: int
) -> None:
    driver = fair_driver(max_queue_requests=100_000)
    worker = driver.worker(slots=slots, kv_tokens=20_000, step_tokens=4096)
    owners = {driver.submit(size, tenant=f"t{tenant}", max_tokens=1): tenant for tenant, size in sizes}
    lengths = {handle: size for handle, (_, size) in zip(owners, sizes, strict=True)}
    had = dict.fromkeys(range(4), 0.0)
    while driver.core.state.waiting_count:
        waiting = {request.submit.tenant for request in driver.core.state.models["m"].waiting.by_submission()}
        driver.tick(0.1)
        for key in list(driver.state_of(worker).holds):
            had[owners[key.key.handle]] += lengths[key.key.handle] + 2
            driver.finish(worker, key.key.handle)
        still = {request.submit.tenant for request in driver.core.state.models["m"].waiting.by_submission()}
        both = [had[number] for number in had if f"t{number}" in waiting & still]
        assert not both or max(both) - min(both) <= FAIRNESS_TOKENS + 2 * 4096 + slots * 3002


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 600), min_size=1, max_size=40), names=st.sampled_from(["", "a"]))
def test_one_tenant_alone_is_served_as_without_fairness(sizes: list[int], names: str) -> None:
    orders = []
    for policy in ("auto", "length"):
        driver = Driver(policy=policy)
        driver.gateway()
        worker = driver.worker(slots=2)
        for size in sizes:
            driver.submit(size, tenant=names)
            driver.tick(0.01)
        while driver.state_of(worker).holds:
            driver.finish(worker, next(iter(driver.state_of(worker).holds)).key.handle)
            driver.tick(0.1)
        orders.append(driver.grants(worker))
    assert orders[0] == orders[1]
