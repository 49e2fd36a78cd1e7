"""Captured steps of the Triton kernels, in Triton's interpreter: grids for a band, results for a context."""

from __future__ import annotations

import torch
from rerun_recorder import RerunRecorder, make_decoder

from sfllm_worker.backends import make_triton_decoder
from sfllm_worker.graphs.captured import CapturedRunner
from sfllm_worker.graphs.keys import GraphKey, GraphPlan
from sfllm_worker.graphs.runner import EagerRunner, StepInputs
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.model.decoder import Decoder

BLOCK = 16
TABLE = [3, 7]


def step(lengths: list[int], contexts: list[int]) -> StepInputs:
    batch = AttentionBatch.build(lengths, contexts, [TABLE], BLOCK)
    ids = (batch.positions * 13 + 5) % 500
    return StepInputs(ids, batch, batch.last_rows.tolist())


@torch.inference_mode()
def test_a_captured_step_of_kernels_gives_what_plain_torch_gives() -> None:
    recorder = RerunRecorder()
    plain = make_decoder(num_hidden_layers=1)
    kernels = make_triton_decoder(plain.config, plain.weights, context_length=1024)
    caches = [KVCache(plain.config, 10, BLOCK, torch.float32) for _ in range(2)]
    # Of the band's two splits the context touches one; the second row is padding.
    runner = CapturedRunner(kernels, caches[0], GraphPlan((GraphKey(2, 512),), ()), recorder, lambda: 0)
    runner.capture_first()
    eager = EagerRunner(Decoder(plain.config, plain.weights), caches[1])
    for inputs in (step([18], [18]), step([1], [19])):
        torch.testing.assert_close(runner.run(inputs), eager.run(inputs), rtol=1e-4, atol=1e-4)
    assert recorder.replays == 1
    ours, theirs = (cache.storage[:, :, 1:] for cache in caches)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
