"""The whole engine over captured steps: prompts, decodes, chunks beside decodes, preemption."""

from __future__ import annotations

import pytest
import torch
from rerun_recorder import RerunRecorder

from sfllm.messages import Sampling
from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.planner import Limits
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.graphs.captured import CapturedRunner
from sfllm_worker.graphs.keys import GraphKey, GraphPlan, plan_graphs
from sfllm_worker.graphs.runner import EagerRunner, GraphRunner
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.model.decoder import Decoder

CPU = torch.device("cpu")
LIMITS = Limits(max_sequences=6, max_step_tokens=16, block_size=8)
MAX_MODEL_LEN = 64


def engine(runner: GraphRunner, kv: KVCache, **options: bool) -> Engine:
    return Engine(runner, kv, LIMITS, (), MAX_MODEL_LEN, CPU, **options)


def captured(decoder: Decoder, kv: KVCache, recorder: RerunRecorder, plan: GraphPlan) -> CapturedRunner:
    runner = CapturedRunner(decoder, kv, plan, recorder, lambda: 0)
    runner.capture_first()
    return runner


def sequence(key: int) -> Sequence:
    prompt = [(37 * key + i) % 500 for i in range(5 + 9 * key)]
    sampling = Sampling(max_tokens=12, seed=key, temperature=0.8 * (key % 2), ignore_eos=True)
    return Sequence(key, 0, prompt, len(prompt), sampling)


def outputs(e: Engine) -> dict[object, list[int]]:
    sequences = [sequence(key) for key in range(5)]
    for added in sequences:
        e.add(added)
    tokens: dict[object, list[int]] = {}
    while e.has_work:
        for progress in e.step().progress:
            assert progress.token is not None
            tokens.setdefault(progress.sequence.key, []).append(progress.token)
    e.check_integrity()
    return tokens


@pytest.mark.parametrize("overlap", [False, True])
def test_captured_steps_give_the_tokens_of_eager_ones(
    plain: Decoder, recorder: RerunRecorder, overlap: bool
) -> None:
    caches = [KVCache(plain.config, 24, LIMITS.block_size, torch.float32) for _ in range(2)]
    runner = captured(plain, caches[0], recorder, plan_graphs((1, 2, 4, 6), (32, 64)))
    ours = outputs(engine(runner, caches[0], overlap=overlap))
    assert ours == outputs(engine(EagerRunner(plain, caches[1]), caches[1]))
    assert runner.figures.replays > 10
    assert runner.figures.eager_steps > 3


def test_nothing_is_captured_while_a_sequence_waits_or_runs(plain: Decoder, recorder: RerunRecorder) -> None:
    kv = KVCache(plain.config, 24, LIMITS.block_size, torch.float32)
    plan = GraphPlan((GraphKey(6, 64),), (GraphKey(3, 64),))
    e = engine(captured(plain, kv, recorder, plan), kv, overlap=True)
    e.add(sequence(0))
    while e.has_work:
        with pytest.raises(RuntimeError, match="comes before"):
            e.idle()
        e.step()
    assert recorder.captures == 1
    assert not e.idle()
    assert recorder.captures == 2
