"""How much memory is kept for graphs, on a device whose memory is counted by the test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rerun_recorder import RerunRecorder
from torch import Tensor

from sfllm_worker.graphs.keys import GraphKey, plan_graphs
from sfllm_worker.graphs.recorder import Recording
from sfllm_worker.graphs.reservation import (
    LOGITS_COPIES,
    MARGIN_BYTES,
    MARGIN_SHARE,
    Rehearsal,
    bytes_to_reserve,
)
from sfllm_worker.model.decoder import Decoder
from sfllm_worker.sizing import cache_blocks

POOL, EACH = 500_000_000, 3_000_000
PLAN = plan_graphs((1, 2, 4, 8, 16), (256, 512))
LARGEST = GraphKey(16, 512)


class CountedMemory:
    """Graphs of a recorder that is gone count as freed once the memory is released."""

    def __init__(self) -> None:
        self.taken = 0
        self.recorders = 0

    def free(self) -> int:
        return 10**9 - self.taken

    def release(self) -> None:
        self.taken = 0

    def recorder(self) -> AllocatingRecorder:
        self.recorders += 1
        return AllocatingRecorder(self)


class AllocatingRecorder(RerunRecorder):
    """The first capture takes the pool, each one a little for itself."""

    def __init__(self, memory: CountedMemory) -> None:
        super().__init__()
        self.memory = memory

    def capture(self, function: Callable[[], Tensor]) -> Recording:
        self.memory.taken += EACH + (0 if self.captures else POOL)
        return super().capture(function)


def reserved(decoder: Decoder, memory: CountedMemory, *, captured: bool) -> int:
    rehearsal = Rehearsal(24, LARGEST.batch, LARGEST, PLAN, memory.recorder if captured else None)
    return bytes_to_reserve(decoder, rehearsal, 8, memory)


def test_the_largest_graph_and_a_share_for_each_of_the_others_are_kept(plain: Decoder) -> None:
    memory = CountedMemory()
    sampling = LOGITS_COPIES * 4 * LARGEST.batch * plain.config.vocab_size
    needed = POOL + EACH * len(PLAN.keys)
    assert reserved(plain, memory, captured=True) == pytest.approx(
        (needed + sampling) * (1 + MARGIN_SHARE) + MARGIN_BYTES, abs=10
    )
    assert memory.taken == 0


def test_without_graphs_only_steps_count(plain: Decoder) -> None:
    memory = CountedMemory()
    assert MARGIN_BYTES < reserved(plain, memory, captured=False) < MARGIN_BYTES + 10**6
    assert memory.recorders == 0


def test_what_is_reserved_is_not_given_to_the_cache() -> None:
    def blocks(reserved_bytes: int) -> int:
        return cache_blocks(
            device=torch.device("cpu"),
            bytes_per_block=2**20,
            block_size=32,
            cache_tokens=None,
            mem_fraction=0.01,
            useful_tokens=10**12,
            reserved_bytes=reserved_bytes,
        )

    assert blocks(2**29) <= blocks(0)
    with pytest.raises(ValueError, match="--max-batch-size"):
        blocks(2**60)
