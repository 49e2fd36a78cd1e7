"""Limits per tenant: refused with the time to come back, never more than the limit, bounded memory."""

from __future__ import annotations

import pytest
from core_driver import Driver
from hypothesis import given
from hypothesis import strategies as st

from sfllm.config import parse
from sfllm.errors import HTTP_ERRORS, ErrorCode
from sfllm.messages import Admitted, Rejected
from sfllm.settings import SchedulerSettings
from sfllm_scheduler.core.rate_limits import MAX_TENANTS, Limits, RateLimits
from sfllm_scheduler.service import policy_values


def limited(**policy: object) -> Driver:
    driver = Driver(lease_seconds=1e6, **policy)
    driver.gateway()
    driver.worker(slots=100, kv_tokens=100_000)
    return driver


def test_requests_beyond_the_limit_are_refused_with_the_time_until_the_next_one_may_come() -> None:
    driver = limited(tenant_requests_per_minute=3)
    handles = [driver.submit(tenant="a") for _ in range(4)]
    (rejected,) = driver.to_gateway(Rejected)
    assert (rejected.handle, rejected.code) == (handles[3], ErrorCode.RATE_LIMIT_EXCEEDED)
    assert rejected.retry_after_seconds == 20
    assert HTTP_ERRORS[ErrorCode.RATE_LIMIT_EXCEEDED] == (429, "rate_limit_error")
    driver.tick(20.0)
    driver.submit(tenant="a")
    assert len(driver.to_gateway(Admitted)) == 4


def test_a_tenant_does_not_use_up_the_limit_of_another(driver: Driver) -> None:
    driver = limited(tenant_requests_per_minute=1)
    for tenant in ("a", "b", "a"):
        driver.submit(tenant=tenant)
    assert [rejected.handle for rejected in driver.to_gateway(Rejected)] == [3]


def test_tokens_count_as_expected_and_are_corrected_by_what_was_generated() -> None:
    driver = limited(tenant_tokens_per_minute=1000)
    first = driver.submit(500, tenant="a", max_tokens=400)  # 128 are expected
    driver.submit(500, tenant="a", max_tokens=400)
    assert driver.to_gateway(Rejected)[0].retry_after_seconds == 16  # 256 of 1,000 a minute are missing
    driver.tick()
    worker = b"w-W1"
    driver.finish(worker, first)  # after one token
    driver.submit(400, tenant="a", max_tokens=400)  # 499 are left and 528 are wanted
    assert driver.to_gateway(Rejected)[1].retry_after_seconds == 2


def test_a_request_larger_than_a_minutes_worth_goes_when_nothing_was_used_and_leaves_a_debt() -> None:
    driver = limited(tenant_tokens_per_minute=100)
    driver.submit(300, tenant="a", max_tokens=1)
    assert driver.to_gateway(Rejected) == []
    driver.submit(10, tenant="a", max_tokens=1)
    assert driver.to_gateway(Rejected)[0].retry_after_seconds == 128


def test_retries_and_repeats_are_not_counted_again() -> None:
    driver = limited(tenant_requests_per_minute=1)
    handle = driver.submit(tenant="a")
    driver.submit(tenant="a", handle=handle)
    driver.submit(tenant="a", handle=handle, attempt=1)
    assert driver.to_gateway(Rejected) == []


def test_a_request_that_is_refused_for_another_reason_is_not_counted() -> None:
    driver = limited(tenant_requests_per_minute=1)
    driver.submit(10**4, tenant="a")
    driver.submit(tenant="a")
    assert [rejected.code for rejected in driver.to_gateway(Rejected)] == [ErrorCode.CONTEXT_LENGTH_EXCEEDED]


@given(
    arrivals=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 300)), max_size=60),
    requests=st.integers(1, 10) | st.none(),
    tokens=st.integers(300, 1000) | st.none(),
)
def test_never_more_than_the_limit_and_a_minutes_burst_gets_through(
    arrivals: list[tuple[float, int]], requests: int | None, tokens: int | None
) -> None:
    limits = RateLimits(requests, tokens)
    now = 0.0
    used = 0
    for let_through, (pause, size) in enumerate(arrivals, start=1):
        now += pause
        wait = limits.take("a", size, now)
        if wait > 0:
            assert limits.take("a", size, now) == pytest.approx(wait), "a refusal costs nothing"
            now += wait + 1e-6
            assert limits.take("a", size, now) == 0.0, "the time that was told is enough"
        used += size
        assert requests is None or let_through <= requests * (1 + now / 60) + 1e-3
        assert tokens is None or used <= tokens * (1 + now / 60) + 1e-3


def test_memory_holds_only_tenants_of_the_last_minutes() -> None:
    limits = RateLimits(10, None)
    for number in range(5000):
        limits.take(f"t{number}", 1, number * 0.1)
    assert len(limits) < 100
    crowd = RateLimits(1, None)
    for number in range(MAX_TENANTS + 100):
        crowd.take(f"t{number}", 1, 0.0)
    assert len(crowd) <= MAX_TENANTS
    unlimited = RateLimits(None, None)
    assert unlimited.take("a", 10**9, 0.0) == 0.0
    assert len(unlimited) == 0


def test_tenants_with_limits_of_their_own_have_these_instead_of_the_common_ones() -> None:
    settings = SchedulerSettings(tenant_limits=("small=1:", "large=:1000", "free=:"))
    driver = limited(tenant_requests_per_minute=2, tenant_limits=policy_values(settings).tenant_limits)
    refused = {}
    for tenant in ("small", "large", "free", "other"):
        handles = [driver.submit(100, tenant=tenant, max_tokens=100) for _ in range(8)]
        rejected = {message.handle for message in driver.to_gateway(Rejected)}
        refused[tenant] = len(rejected & set(handles))
    # 1,000 tokens are five requests of 200.
    assert refused == {"small": 7, "large": 3, "free": 0, "other": 6}


@pytest.mark.parametrize("entry", ["a", "a=", "a=5", "a=0:", "a=1:2:3", "=1:2", "a=-1:2", "a=x:"])
def test_limits_of_another_form_are_refused(entry: str) -> None:
    with pytest.raises(SystemExit):
        parse(SchedulerSettings, prog="", description="", argv=[f"--tenant-limits={entry}"], environ={})


def test_memory_holds_no_tenant_whose_own_limits_are_used_up_by_nobody() -> None:
    limits = RateLimits(None, None, {"a": Limits(1, None)})
    assert limits.any
    for number in range(100):
        assert limits.take(f"other-{number}", 1.0, 0.0) == 0.0
    assert limits.take("a", 1.0, 0.0) == 0.0
    assert limits.take("a", 1.0, 0.0) == 60.0
    assert len(limits) == 1
