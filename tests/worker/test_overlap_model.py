"""A real model, eagerly and by captured graphs, says the same with and without overlap."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from fake_device import DelayedCache, DelayedRunner, DelayedSampler, FakeDevice, guard_blocks
from fake_model import BLOCK_SIZE
from overlap import CPU, ENDLESS, Output, finish, sequence
from rerun_recorder import RerunRecorder, make_decoder

from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.planner import Limits
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.graphs.captured import CapturedRunner
from sfllm_worker.graphs.keys import plan_graphs
from sfllm_worker.graphs.runner import EagerRunner, GraphRunner
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.model.decoder import Decoder

MAX_MODEL_LEN = 96
LIMITS = Limits(max_sequences=6, max_step_tokens=24, block_size=BLOCK_SIZE)


class Overlapped(NamedTuple):
    engine: Engine
    device: FakeDevice
    kv: KVCache
    recorder: RerunRecorder


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()


def cache(decoder: Decoder) -> KVCache:
    """Too few blocks for comfort."""
    return KVCache(decoder.config, 40, BLOCK_SIZE, torch.float32)


def plain_engine(decoder: Decoder) -> Engine:
    kv = cache(decoder)
    return Engine(EagerRunner(decoder, kv), kv, LIMITS, (7,), MAX_MODEL_LEN, CPU)


def overlapped(decoder: Decoder, captured: bool = False) -> Overlapped:
    device, kv, recorder = FakeDevice(), cache(decoder), RerunRecorder()
    runner: GraphRunner = EagerRunner(decoder, kv)
    if captured:
        plan = plan_graphs((1, 2, 4, 6), (32, MAX_MODEL_LEN))
        runner = CapturedRunner(decoder, kv, plan, recorder, free_bytes=lambda: 0)
        runner.capture_first()
    engine = Engine(
        DelayedRunner(device, runner),
        DelayedCache(device, kv),  # type: ignore[arg-type]  # it stands before the real one
        *(LIMITS, (7,), MAX_MODEL_LEN, CPU, DelayedSampler(device)),
        overlap=True,
    )

    def spoil(blocks: list[int]) -> None:
        kv.storage[:, :, blocks] = 7.0

    guard_blocks(engine, device, spoil)
    return Overlapped(engine, device, kv, recorder)


@pytest.mark.parametrize("captured", [False, True])
@torch.inference_mode()
def test_a_real_model_says_the_same_with_and_without_overlap(decoder: Decoder, captured: bool) -> None:
    def traffic() -> list[Sequence]:
        return [
            sequence(
                key,
                [key, *range(3 * key)],
                forks=key % 3,
                temperature=0.8,
                max_tokens=25,
                ignore_eos=key % 2 == 0,
            )
            for key in range(8)
        ]

    plain, (engine, _, _, recorder) = plain_engine(decoder), overlapped(decoder, captured)
    for each in (plain, engine):
        for made in traffic():
            each.add(made)
    expected, output = finish(plain), finish(engine)
    assert output.tokens == expected.tokens
    assert output.ends == expected.ends
    assert output.preempted, "the cache was meant to be too small"
    assert bool(recorder.replays) == captured


@torch.inference_mode()
def test_a_row_that_is_not_finite_leaves_a_clean_cache_though_the_next_step_had_it_too(
    decoder: Decoder,
) -> None:
    plain, (engine, device, kv, _) = plain_engine(decoder), overlapped(decoder)
    plain.add(sequence(2, [2] * 9, **ENDLESS))
    expected = finish(plain).tokens
    sick, well = sequence(1, [1] * 9, **ENDLESS), sequence(2, [2] * 9, **ENDLESS)
    engine.add(sick)
    engine.add(well)
    output = Output()
    for _ in range(3):
        output.take(engine.step())
    device.synchronize()
    kv.storage[:, :, sick.block_table[0]] = torch.nan
    finish(engine, output)
    device.synchronize()
    assert output.ends[1, 0] == ("fault", -1)
    assert output.tokens[2, 0] == expected[2, 0]
    assert not torch.isnan(kv.storage).any()
    again = sequence(3, [1] * 9, **ENDLESS)
    engine.add(again)
    finish(engine)
    assert again.cached_tokens == 0, "what it computed cannot be found"
