"""How much device memory steps and graphs will take, measured before the KV cache gets the rest.

A rehearsal over a small cache runs the largest steps and captures the largest graph and a few others. What
is left of it (compiled kernels, scratch that kernels keep) counts as taken already; what it gave back is
what has to stay free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from sfllm_worker.graphs.buffers import StaticBuffers
from sfllm_worker.graphs.captured import CapturedRunner
from sfllm_worker.graphs.keys import GraphKey, GraphPlan
from sfllm_worker.graphs.recorder import Recorder
from sfllm_worker.graphs.runner import EagerRunner, StepInputs
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.model.decoder import TextModel

SAMPLED_GRAPHS = 4
"""Graphs captured after the largest, to learn what one costs that fits into the memory of the largest."""

LOGITS_COPIES = 4
"""What choosing tokens takes besides the logits themselves, at most."""

MARGIN_SHARE = 0.1
MARGIN_BYTES = 128 * 2**20
"""Drivers and allocators take memory in pieces, at moments of their own choice."""


class DeviceMemory(Protocol):
    """The memory of one device."""

    def free(self) -> int:
        """Bytes that are free now."""
        ...

    def release(self) -> None:
        """Give back what is cached and unused."""
        ...


class Rehearsal(NamedTuple):
    """What to rehearse: a prefill of `step_tokens`, decodes of the `largest` shape, graphs of a plan."""

    step_tokens: int
    logit_rows: int
    """The most tokens of a step whose logits are wanted, if it has so many."""
    largest: GraphKey
    plan: GraphPlan
    make_recorder: Callable[[], Recorder] | None
    """None when nothing is to be captured."""


@torch.inference_mode()
def bytes_to_reserve(decoder: TextModel, rehearsal: Rehearsal, block_size: int, memory: DeviceMemory) -> int:
    """Device memory that steps and all graphs of the plan need besides weights and KV cache."""
    blocks = 1 + -(-rehearsal.step_tokens // block_size)
    kv = KVCache(decoder.config, blocks + 1, block_size, decoder.dtype, decoder.device)
    memory.release()
    least_free, further_graphs = _rehearse(decoder, kv, rehearsal, memory)
    memory.release()
    needed = max(0, memory.free() - least_free) + further_graphs
    sampling = LOGITS_COPIES * 4 * rehearsal.logit_rows * decoder.config.vocab_size
    return int((needed + sampling) * (1 + MARGIN_SHARE)) + MARGIN_BYTES


def _rehearse(decoder: TextModel, kv: KVCache, rehearsal: Rehearsal, memory: DeviceMemory) -> tuple[int, int]:
    """Free bytes while all that was rehearsed is there, and what the plan's other graphs will take."""
    EagerRunner(decoder, kv).run(_prefill(rehearsal.step_tokens, rehearsal.logit_rows, kv.block_size))
    _decode(decoder, kv, rehearsal.largest)
    if rehearsal.make_recorder is None:
        return memory.free(), 0
    rest = rehearsal.plan.keys[1:]
    sampled = rest[:: max(1, -(-len(rest) // SAMPLED_GRAPHS))]
    runner = CapturedRunner(decoder, kv, rehearsal.plan, rehearsal.make_recorder(), memory.free)
    runner.capture(rehearsal.plan.largest)
    after_largest = memory.free()
    for key in sampled:
        runner.capture(key)
    least_free = memory.free()
    each = max(0, after_largest - least_free) / max(1, len(sampled))
    return least_free, int(each * (len(rest) - len(sampled)))


def _decode(decoder: TextModel, kv: KVCache, key: GraphKey) -> None:
    """A step of padding rows alone, of that shape."""
    buffers = StaticBuffers([key], kv.block_size, kv.device)
    buffers.fill_padding(key)
    token_ids, batch = buffers.inputs(key)
    decoder.logits(decoder.forward(token_ids, batch.positions, batch, kv))


def _prefill(tokens: int, logit_rows: int, block_size: int) -> StepInputs:
    """One long chunk of a prompt, with logits of as many tokens as a step could want."""
    blocks = [1 + i for i in range(-(-tokens // block_size))]
    batch = AttentionBatch.build([tokens], [tokens], [blocks], block_size)
    return StepInputs(torch.zeros(tokens, dtype=torch.int64), batch, list(range(min(tokens, logit_rows))))
