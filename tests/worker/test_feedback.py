"""What a worker says of itself: prefill that is left, cached prompts, the speed of its steps, recalls."""

import random

import pytest
from protocol_driver import GATEWAY, LEASE, STEP_SECONDS, Driver, joined, mock_engine

from sfllm.batch_sizing import LEAST_PREFILL_TOKENS
from sfllm.messages import (
    Grant,
    GrantedRequest,
    Recall,
    Sampling,
    WorkerBeat,
    WorkerCancel,
    WorkerProgress,
    WorkerReturned,
    WorkerWelcome,
)
from sfllm.prefixes import prefix_names
from sfllm.step_curve import StepCurve
from sfllm.wire import as_array
from sfllm_worker.mock.engine import MockEngine
from sfllm_worker.protocol_results import Outgoing


def large_engine(**sizes: int) -> MockEngine:
    return mock_engine(max_model_len=4096, **sizes)


def grant(driver: Driver, handle: int, prompt: list[int], max_tokens: int = 4) -> list[int]:
    """Grant a prompt with the names of its beginnings, which are given back."""
    names = prefix_names(as_array("I", prompt), "")
    request = GrantedRequest(
        *(GATEWAY, f"r{handle}", handle, 0, (0,), len(prompt), (0,)),
        sampling=Sampling(max_tokens=max_tokens, seed=handle, ignore_eos=True),
        queue_seconds=0.0,
        prefix_count=len(names),
    )
    driver.tell(Grant(LEASE, (request,)), as_array("I", prompt), as_array("I", ()), names)
    return names.tolist()


def prompt_of(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(1, 200), k=tokens)


def cached_names(driver: Driver) -> list[int]:
    """The array of the next beat."""
    driver.collect()
    before = len(driver.sent)
    driver.wait(2.0)
    driver.collect()
    sent = [each for each in driver.sent[before:] if isinstance(each, Outgoing)]
    (beat,) = [each for each in sent if isinstance(each.message, WorkerBeat)]
    return beat.arrays[0].tolist()


def progress(driver: Driver) -> list[tuple[int, int]]:
    return [(each.grants, each.pending_tokens) for each in driver.messages(WorkerProgress)]


def test_it_says_how_much_prefill_is_left_after_every_step_that_changes_it() -> None:
    driver = joined(large_engine(step_tokens=64, max_sequences=4, kv_tokens=2048))
    grant(driver, 1, prompt_of(1, 150))
    driver.step()
    grant(driver, 2, prompt_of(2, 30))
    driver.step(2)
    assert progress(driver) == [(1, 64), (2, 52), (2, 0)]


def test_decodes_alone_say_nothing() -> None:
    driver = joined(large_engine(step_tokens=64, max_sequences=4, kv_tokens=2048))
    grant(driver, 1, prompt_of(1, 50), max_tokens=20)
    driver.step()
    said = progress(driver)
    driver.step(10)
    assert progress(driver) == said


def test_cached_tokens_need_no_prefill() -> None:
    driver = joined(large_engine(step_tokens=64, max_sequences=4, kv_tokens=2048))
    shared = prompt_of(1, 128)
    grant(driver, 1, [*shared, 7])
    driver.run()
    grant(driver, 2, [*shared, *prompt_of(2, 40)])
    grant(driver, 3, [*shared, *prompt_of(3, 60)])
    driver.step()
    assert progress(driver)[-1] == (3, 36), "64 of 40 and 60 tokens were computed"


def test_a_cancel_takes_its_prefill_away() -> None:
    driver = joined(large_engine(step_tokens=64, max_sequences=4, kv_tokens=2048))
    grant(driver, 1, prompt_of(1, 200))
    driver.step()
    driver.tell(WorkerCancel(LEASE, GATEWAY, 1, 0, -1))
    assert progress(driver)[-1] == (1, 0)


def test_a_new_lease_counts_from_the_beginning() -> None:
    driver = joined()
    grant(driver, 1, prompt_of(1, 10))
    driver.step()
    driver.join(lease=LEASE + 1)
    request = GrantedRequest(*(GATEWAY, "r9", 9, 0, (0,), 3, (0,)), Sampling(4, 1), queue_seconds=0.0)
    arrays = as_array("I", [1, 2, 3]), as_array("I", ()), as_array("Q", ())
    driver.tell(Grant(LEASE + 1, (request,)), *arrays)
    driver.step()
    assert progress(driver)[-1] == (1, 0)


def test_a_request_that_has_not_begun_is_given_back_when_it_is_recalled() -> None:
    driver = joined(large_engine(step_tokens=64, max_sequences=1, kv_tokens=2048))
    grant(driver, 1, prompt_of(1, 20), max_tokens=50)
    grant(driver, 2, prompt_of(2, 20))
    driver.step()
    for handle in (1, 2, 2, 3):
        driver.tell(Recall(LEASE, GATEWAY, handle, 0))
    assert driver.messages(WorkerReturned) == [WorkerReturned(LEASE, GATEWAY, 2, 0)]
    driver.run()
    assert set(driver.tokens()) == {(1, 0)}, "the first goes on"
    assert driver.all_free()


@pytest.mark.parametrize("block_size", [4, 32, 48, 128])
def test_beats_name_the_beginnings_that_the_cache_has(block_size: int) -> None:
    engine = large_engine(step_tokens=512, max_sequences=4, kv_tokens=4608, block_size=block_size)
    driver = joined(engine)
    names = grant(driver, 1, prompt_of(1, 300), max_tokens=2)
    assert cached_names(driver) == [], "nothing is computed yet"
    driver.run()
    known = [name for index, name in enumerate(names) if (index + 1) * 64 // block_size]
    assert cached_names(driver) == known[::-1]


def test_beginnings_that_gave_way_are_named_no_more_and_those_used_again_come_first() -> None:
    driver = joined(large_engine(step_tokens=512, max_sequences=4, kv_tokens=1024, block_size=32))
    first, second = prompt_of(1, 200), prompt_of(2, 200)
    names = grant(driver, 1, first), grant(driver, 2, second)
    driver.run()
    grant(driver, 3, first)
    driver.run()
    found = cached_names(driver)
    assert found[:3] == names[0][::-1]
    assert set(found) == {*names[0], *names[1]}
    grant(driver, 4, prompt_of(4, 700))
    driver.run()
    found = cached_names(driver)
    assert names[1][-1] not in found, "used longest ago, and ends go before beginnings"
    assert set(names[0]) <= set(found)


def test_beats_tell_the_speed_and_the_lengths_of_what_runs() -> None:
    driver = joined(large_engine(step_tokens=64, max_sequences=4, kv_tokens=2048))
    for handle in (1, 2):
        grant(driver, handle, prompt_of(handle, 20), max_tokens=100)
    driver.step(30)
    driver.wait(2.0)
    beat = driver.messages(WorkerBeat)[-1]
    assert StepCurve(*beat.step_curve).seconds(0, 2, 80) == pytest.approx(STEP_SECONDS)
    assert sum(beat.bands) == 2
    assert beat.slots == 4


def test_a_target_for_the_time_between_tokens_lowers_what_is_taken_and_is_kept() -> None:
    truth = StepCurve(0.002, 0.0001, 0.001, 1e-6)
    target = 0.010
    engine = large_engine(step_tokens=256, max_sequences=32, kv_tokens=16384)
    engine.keep_within(target)
    driver = joined(engine)
    seconds = []
    for handle in range(1, 301):
        if engine.num_running + engine.num_waiting < 40:
            grant(driver, handle, prompt_of(handle, 60), max_tokens=40)
        result = engine.step()
        took = truth.seconds(*result.shape)
        driver.protocol.publish(result, driver.now, driver.now + took)
        driver.wait(took)
        seconds.append(took)
    assert driver.messages(WorkerBeat)[-1].slots < 10
    assert max(seconds[-60:]) <= target + LEAST_PREFILL_TOKENS * truth.per_prefill_token
    driver.run()


def test_short_prompts_are_computed_beside_a_long_one_if_the_scheduler_says_so() -> None:
    driver = Driver(large_engine(step_tokens=64, max_sequences=8, kv_tokens=4096), 10.0)
    driver.tell(WorkerWelcome(1, LEASE, 1.0, 30.0, shortest_first=True))
    grant(driver, 1, prompt_of(1, 1000))
    grant(driver, 2, prompt_of(2, 30))
    driver.step()
    assert set(driver.tokens()) == {(2, 0)}
    driver.step(30)
    assert (1, 0) in driver.tokens(), "the long one has half of each step"


def test_what_another_prompt_computes_is_not_counted_twice() -> None:
    driver = joined(large_engine(step_tokens=64, max_sequences=4, kv_tokens=2048))
    shared = prompt_of(1, 192)
    for handle in (1, 2, 3):
        grant(driver, handle, [*shared, *prompt_of(handle + 1, 10)])
    driver.step()
    assert progress(driver)[-1] == (3, 64 + 10 + 10), "the others wait for the first one's blocks"
    driver.run()
    assert progress(driver)[-1] == (3, 0)


def test_a_preempted_sequence_is_prefill_that_is_left() -> None:
    driver = joined(large_engine(step_tokens=64, max_sequences=4, kv_tokens=128, block_size=4))
    for handle in (1, 2):
        grant(driver, handle, prompt_of(handle, 50), max_tokens=40)
    driver.step(2)
    assert progress(driver)[-1] == (2, 0)
    while not driver.engine.num_waiting:
        driver.step()
    assert progress(driver)[-1][1] == driver.engine.pending_prefill_tokens > 0
    driver.run()
    assert progress(driver)[-1] == (2, 0)


def test_a_grant_that_makes_no_sense_counts_as_one_that_came() -> None:
    driver = joined()
    driver.tell(Grant(LEASE, ()), as_array("I", [1]), as_array("I", ()), as_array("Q", ()))
    driver.grant(1)
    driver.step()
    assert progress(driver) == [(2, 0)]


def test_the_time_of_a_step_is_that_between_results_while_there_is_work() -> None:
    """A launch in advance ends early: what counts is how often tokens come."""
    engine = large_engine(step_tokens=64, max_sequences=4, kv_tokens=2048)
    driver = joined(engine)
    grant(driver, 1, prompt_of(1, 20), max_tokens=60)
    driver.now += 1.0  # idle time is no step's
    call_seconds = 0.02
    while engine.has_work:
        result = engine.step()
        driver.now += 0.02
        driver.protocol.publish(result, driver.now - call_seconds, driver.now)
        call_seconds = 0.001
    driver.wait(2.0)
    beat = driver.messages(WorkerBeat)[-1]
    assert StepCurve(*beat.step_curve).seconds(0, 1, 50) == pytest.approx(0.02, rel=0.01)


def test_beats_during_a_step_say_what_the_last_one_said_of_cache_and_speed() -> None:
    driver = joined(large_engine(step_tokens=64, max_sequences=4, kv_tokens=2048))
    names = grant(driver, 1, prompt_of(1, 200), max_tokens=100)
    driver.step(20)
    driver.wait(2.0)
    before = driver.messages(WorkerBeat)[-1]
    driver.step()
    beat = driver.protocol.beat()
    assert beat is not None
    assert isinstance(beat.message, WorkerBeat)
    assert beat.message.step == before.step + 1
    assert beat.message.step_curve == before.step_curve != ()
    assert beat.arrays[0].tolist() == names[::-1]
