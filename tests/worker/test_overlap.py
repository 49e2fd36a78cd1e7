"""An engine that launches each step before the one before it is read, on a device that works later."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fake_device import FakeDevice
from fake_model import BLOCK_SIZE, is_faulty, next_token
from overlap import END_OF_TEXT, ENDLESS, Output, finish, overlapped_engine, plain_engine, sequence

from sfllm_worker.engine.planner import Limits


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


def prompt_that(wanted: Callable[[list[int], list[int]], bool]) -> list[int]:
    """A prompt for which `wanted` holds, given the prompt and what the fake model says after it."""
    for number in range(50**2):
        tokens = [number // 50, number % 50, 1, 2]
        output: list[int] = []
        for _ in range(8):
            output.append(next_token([*tokens, *output]))
        if wanted(tokens, output):
            return tokens
    raise AssertionError("no such prompt")


def test_each_step_is_launched_before_the_one_before_it_is_read(device: FakeDevice) -> None:
    engine = overlapped_engine(device)
    for key in range(3):
        engine.add(sequence(key, [key, 1, 2], **ENDLESS))
    for _ in range(6):
        engine.step()
    expected = [("launch", 1)]
    for step in range(1, 7):
        expected += [("launch", step + 1), ("read", step)]
    assert device.log == expected


def test_nothing_waits_for_the_device_but_the_reading_of_tokens(device: FakeDevice) -> None:
    engine = overlapped_engine(device)
    for key in range(3):
        engine.add(sequence(key, [key, *range(10)], forks=key % 2, temperature=0.7, logprobs=2))
    finish(engine)
    assert device.host_waits == 0


class NoStaging:
    def to_device(self, _arrays: object) -> list[torch.Tensor]:
        raise AssertionError("something is copied to the device")


def test_a_batch_that_nobody_joins_or_leaves_is_fed_without_a_copy(device: FakeDevice) -> None:
    engine = overlapped_engine(device)
    for key in range(2):
        engine.add(sequence(key, [key, 1, 2], **ENDLESS))
    engine.step()
    engine._staging = NoStaging()  # type: ignore[assignment]  # from here on there is nothing to copy
    for _ in range(4):
        engine.step()
    engine.cancel(engine.planner.running[0])
    with pytest.raises(AssertionError, match="copied"):
        engine.step()


def test_a_sequence_that_ends_by_length_is_not_launched_again(device: FakeDevice) -> None:
    engine = overlapped_engine(device)
    engine.add(sequence(1, [1, 2, 3], ignore_eos=True, max_tokens=4))
    computed = 0
    while engine.has_work:
        computed += engine.step().num_tokens
    assert computed == 3 + 3, "the prompt, and all of the output but its last token"


def test_the_row_of_a_sequence_that_has_ended_is_dropped_and_its_blocks_come_back(device: FakeDevice) -> None:
    engine = overlapped_engine(device)
    ends_in_time = prompt_that(lambda _, output: [token in END_OF_TEXT for token in output[:3]] == [0, 0, 1])
    engine.add(sequence(1, ends_in_time))
    output = Output()
    while not output.ends:
        output.take(engine.step())
    assert len(output.tokens[1, 0]) == 2
    assert engine.num_running == 0
    assert engine.has_work, "a step is in flight"
    assert engine.free_kv_tokens < engine.kv_tokens
    result = engine.step()
    assert (result.progress, result.num_tokens) == ([], 1)
    assert not engine.has_work
    assert engine.free_kv_tokens == engine.kv_tokens


def test_what_comes_of_a_step_does_not_mention_what_was_cancelled_since(device: FakeDevice) -> None:
    engine = overlapped_engine(device)
    gone = sequence(1, [1, *range(8)], prompt_logprobs=1, **ENDLESS)
    stays = sequence(2, [2, 1], **ENDLESS)
    engine.add(stays)
    engine.step()
    engine.add(gone)
    engine.step()
    assert gone in engine.planner.running
    engine.cancel(gone)
    result = engine.step()
    assert [progress.sequence for progress in result.progress] == [stays]
    assert result.prompt_reports == []
    assert engine.step().progress


def test_blocks_of_a_cancelled_sequence_are_free_before_the_next_but_one_step(device: FakeDevice) -> None:
    engine = overlapped_engine(device)
    victim = sequence(1, list(range(20)), **ENDLESS)
    engine.add(victim)
    engine.add(sequence(2, [1], **ENDLESS))
    for _ in range(4):
        engine.step()
    engine.cancel(victim)
    before = engine.free_kv_tokens
    engine.step()
    assert engine.free_kv_tokens >= before + 5 * BLOCK_SIZE


def test_while_a_row_needs_its_tokens_each_step_is_read_before_the_next(device: FakeDevice) -> None:
    engine = overlapped_engine(device)
    engine.add(sequence(1, [1, 2], forks=1, repetition_penalty=1.2, max_tokens=4, ignore_eos=True))
    free = sequence(2, [2, 2], **ENDLESS)
    engine.add(free)
    assert [len(engine.step().progress) for _ in range(4)] == [3] * 4
    assert device.log == [(what, step) for step in range(1, 5) for what in ("launch", "read")]
    assert [[progress.sequence for progress in engine.step().progress] for _ in range(2)] == [[free]] * 2
    assert device.log[8:] == [("launch", 5), ("launch", 6), ("read", 5), ("launch", 7), ("read", 6)]


def test_all_that_is_in_flight_is_read_before_anyone_is_preempted(device: FakeDevice) -> None:
    engine = overlapped_engine(device, blocks=11)
    for key in range(2):
        engine.add(sequence(key, [key, *range(17)], **ENDLESS))
    output = Output()
    while not output.preempted:
        is_idle = not device.busy_blocks
        output.take(engine.step())
    assert is_idle
    finish(engine, output)


def test_a_sequence_that_lacks_a_block_does_not_watch_others_go_on(device: FakeDevice) -> None:
    engine = overlapped_engine(device, blocks=3)
    engine.add(sequence(1, [1, 2, 3, 4, 5], **ENDLESS))
    engine.add(sequence(2, [1, 2, 3, 4], **ENDLESS))
    preempted = [engine.step().preempted for _ in range(3)]
    assert preempted == [0, 0, 1]
    assert device.log[:4] == [("launch", 1), ("launch", 2), ("read", 1), ("read", 2)]


def test_a_choice_that_takes_its_leaders_place_in_flight_gets_its_own_token(device: FakeDevice) -> None:
    start = [5, 1, 2]
    plain = plain_engine()
    plain.add(sequence(3, start, forks=1, temperature=2.0, **ENDLESS))
    expected = finish(plain).tokens
    assert expected[3, 0][0] != expected[3, 1][0]
    engine = overlapped_engine(device)
    engine.add(sequence(9, [1], **ENDLESS))
    output = Output()
    output.take(engine.step())
    leader = sequence(3, start, forks=1, temperature=2.0, **ENDLESS)
    engine.add(leader)
    output.take(engine.step())
    assert leader.unread == 1
    engine.cancel_fork(leader, 1)
    leader.choice = 1
    assert finish(engine, output).tokens[3, 1] == expected[3, 1]


def test_a_faulty_row_ends_alone_and_leaves_a_clean_cache(device: FakeDevice) -> None:
    def breaks_down(tokens: list[int], output: list[int]) -> bool:
        faulty = [is_faulty([*tokens, *output[:count]]) for count in range(8)]
        return any(faulty[2:]) and not any(faulty[:2])

    start = prompt_that(breaks_down)
    engine = overlapped_engine(device, faults=True)
    engine.add(sequence(1, start, **ENDLESS))
    output = finish(engine)
    assert output.ends[1, 0] == ("fault", -1)
    assert output.tokens[1, 0], "it went well at first"
    again = overlapped_engine(device)
    again.add(sequence(1, start, **ENDLESS))
    assert finish(again).tokens[1, 0][: len(output.tokens[1, 0])] == output.tokens[1, 0]


def test_a_prompt_computed_in_chunks_is_in_flight_twice(device: FakeDevice) -> None:
    limits = Limits(max_sequences=4, max_step_tokens=6, block_size=BLOCK_SIZE)
    engine = overlapped_engine(device, limits=limits)
    start = list(range(20))
    engine.add(sequence(1, start, **ENDLESS))
    made = [engine.step().num_tokens for _ in range(5)]
    assert made == [6, 6, 6, 2, 1]
    assert device.log[:3] == [("launch", 1), ("launch", 2), ("read", 1)]
    plain = plain_engine()
    plain.add(sequence(1, start, **ENDLESS))
    engine.cancel(engine.planner.running[0])
    finish(engine)
    engine.add(sequence(2, start, **ENDLESS))
    assert finish(engine).tokens[2, 0] == finish(plain).tokens[1, 0]
