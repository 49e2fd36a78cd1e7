"""What is expected of outputs follows what ended, and never exceeds what a request may generate."""

from __future__ import annotations

from random import Random

from core_driver import Driver, finished
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sfllm.messages import WorkerFinished
from sfllm_scheduler.core.events import FromWorker
from sfllm_scheduler.core.output_lengths import LEAST_OBSERVATIONS, OutputLengths
from sfllm_scheduler.core.requests import UNKNOWN_OUTPUT


def learnt(lengths: list[int], max_tokens: int = 4096, band: int = 3) -> OutputLengths:
    outputs = OutputLengths()
    for length in lengths:
        outputs.learn(band, max_tokens, length)
    return outputs


def test_before_anything_has_ended_a_fixed_length_is_expected() -> None:
    assert OutputLengths().expect(3, 4096) == UNKNOWN_OUTPUT
    assert OutputLengths().expect(3, 20) == (20, 20)


def test_equal_outputs_are_expected_as_they_are() -> None:
    mean, reserve = learnt([40] * 50).expect(3, 4096)
    assert mean == 40
    assert 40 <= reserve <= 40 * 1.2, "within a bin"


def test_the_reserve_covers_what_running_sequences_have_generated_at_a_random_moment() -> None:
    outputs = learnt(([10] * 9 + [4000]) * 40)
    reserve = outputs.expect(3, 4096).reserve
    assert 1900 <= reserve <= 2000

    draw, lengths = Random(5), [10] * 9 + [4000]
    running = [(draw.choice(lengths), 0) for _ in range(32)]
    held = []
    for _ in range(20_000):
        running = [(length, done + 1) for length, done in running]
        running = [each if each[1] < each[0] else (draw.choice(lengths), 0) for each in running]
        held.append(sum(done for _, done in running))
    assert sum(held[10_000:]) / 10_000 <= 32 * reserve * 1.1


def test_prompts_of_other_lengths_and_other_limits_have_estimates_of_their_own() -> None:
    outputs = OutputLengths()
    for _ in range(LEAST_OBSERVATIONS):
        outputs.learn(3, 4096, 30)
        outputs.learn(9, 4096, 300)
        outputs.learn(3, 64, 60)
    assert outputs.expect(3, 4096).mean == 30
    assert outputs.expect(9, 4096).mean == 300
    assert outputs.expect(3, 64).mean == 60
    assert outputs.expect(5, 4096).mean == 165, "a prompt length that was never seen: all with that limit"
    assert outputs.expect(5, 10**6).mean == 130, "a limit that was never seen: all of them"


def test_a_change_is_followed_and_old_outputs_are_forgotten() -> None:
    outputs = learnt([1000] * 2000 + [10] * 2000)
    assert outputs.expect(3, 4096).mean < 100


@given(
    lengths=st.lists(st.integers(-5, 10**7), max_size=60),
    limits=st.lists(st.integers(1, 2**32), min_size=1, max_size=3),
    wanted=st.integers(1, 2**32),
)
def test_no_estimate_exceeds_the_limit_and_the_same_ends_give_the_same_estimates(
    lengths: list[int], limits: list[int], wanted: int
) -> None:
    one, two = OutputLengths(), OutputLengths()
    for number, length in enumerate(lengths):
        for outputs in (one, two):
            outputs.learn(number % 3, limits[number % len(limits)], length)
    estimate = one.expect(1, wanted)
    assert estimate == two.expect(1, wanted)
    assert 0 < estimate.mean <= wanted
    assert 1 <= estimate.reserve <= wanted


def test_requests_are_admitted_to_a_workers_cache_by_what_they_are_expected_to_need(driver: Driver) -> None:
    worker = driver.worker(slots=1000, kv_tokens=2000)

    def running_together() -> int:
        for _ in range(60):
            driver.submit(10, max_tokens=1000)
        driver.tick()
        held = [key.key.handle for key in driver.state_of(worker).holds]
        while driver.state_of(worker).holds:
            for key in list(driver.state_of(worker).holds):
                driver.finish(worker, key.key.handle)
            driver.tick()
        return len(held)

    assert running_together() == 2000 // (10 + UNKNOWN_OUTPUT.reserve)
    assert running_together() == 60, "they ended after a token each"


def test_only_requests_that_ended_by_themselves_teach(driver: Driver) -> None:
    worker = driver.worker(slots=100, kv_tokens=100_000)
    handles = [driver.submit(10, max_tokens=1000) for _ in range(40)]
    driver.tick()
    for handle in handles[:20]:
        driver.cancel(handle)
    for handle in handles[20:]:
        driver.finish(worker, handle, reason="abort")
    assert driver.core.state.models["m"].outputs.expect(0, 1000) == UNKNOWN_OUTPUT


def test_what_a_worker_says_cannot_break_the_estimates(driver: Driver) -> None:
    worker = driver.worker(slots=100, kv_tokens=100_000)
    for claimed in (-(10**12), 10**18, 0):
        handle = driver.submit(10, max_tokens=1000)
        driver.tick()
        entry = driver.granted(handle)
        end = replace(finished(entry), generated_tokens=claimed)
        driver.send(FromWorker(worker, WorkerFinished(driver.lease(worker), entry.gateway, end)))
    state = driver.core.state
    assert state.models["m"].waiting.tenants.served("") <= 3 * (10 + 2 * 1000)
