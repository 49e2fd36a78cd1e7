"""Blocks have their memory before they are used, and no more than is likely to be needed."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from sfllm_worker import large_pages
from sfllm_worker.kv.ahead import AHEAD, PIECE_BYTES, MemoryAhead
from sfllm_worker.kv.block_pool import BlockPool
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load import load_model
from sfllm_worker.model.config import ModelConfig

BLOCKS = 8192
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux gives memory ahead")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return load_model("tiny-llama", load_format="dummy").config


def cache(config: ModelConfig) -> KVCache:
    return KVCache(config, BLOCKS, 16, torch.float32)


def faults(kv: KVCache, first: int, last: int) -> int:
    """Page faults of this thread while those blocks are written."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for layer in kv.layers:
        for part in (layer.k, layer.v):
            part[first:last].numpy().fill(1)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def advance_all(ahead: MemoryAhead, used: int) -> int:
    pieces = 0
    while ahead.advance(used):
        pieces += 1
        assert pieces < 10 * BLOCKS
    return pieces


def test_the_blocks_that_come_next_cost_no_page_fault_and_those_behind_them_take_no_memory(
    config: ModelConfig,
) -> None:
    kv = cache(config)
    assert kv.storage.nbytes > 20 * PIECE_BYTES
    assert advance_all(MemoryAhead(kv), used=1) > 0
    assert faults(kv, 1, 1 + BLOCKS // AHEAD) == 0
    assert faults(kv, BLOCKS - BLOCKS // AHEAD, BLOCKS) > 0


def test_what_blocks_hold_stays(config: ModelConfig) -> None:
    kv = cache(config)
    kv.storage[:, :, 1:50] = 7
    advance_all(MemoryAhead(kv), used=1)
    assert torch.all(kv.storage[:, :, 1:50] == 7)
    assert torch.all(kv.storage[:, :, 50:] == 0)


def test_it_goes_on_as_blocks_are_used_up_to_the_last_one(config: ModelConfig) -> None:
    kv = cache(config)
    ahead = MemoryAhead(kv)
    advance_all(ahead, used=1)
    assert advance_all(ahead, used=1) == 0
    assert advance_all(ahead, used=BLOCKS // 2) > 0
    assert faults(kv, BLOCKS // 2, BLOCKS // 2 + BLOCKS // AHEAD) == 0
    advance_all(ahead, used=BLOCKS - 5)
    assert faults(kv, BLOCKS - 5, BLOCKS) == 0
    assert advance_all(ahead, used=BLOCKS) == 0


def test_a_kernel_that_cannot_is_asked_once(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []

    def refuse(piece: torch.Tensor) -> bool:
        asked.append(piece)
        return False

    monkeypatch.setattr(large_pages, "populate", refuse)
    ahead = MemoryAhead(cache(config))
    assert advance_all(ahead, used=1) == 0
    assert advance_all(ahead, used=100) == 0
    assert len(asked) == 1


def test_the_pool_says_up_to_where_blocks_were_used() -> None:
    pool = BlockPool(100)
    assert pool.ever_used == 0
    blocks = pool.allocate(10)
    assert pool.ever_used == max(blocks)
    pool.release(blocks)
    pool.allocate(3)
    assert pool.ever_used == max(blocks)
