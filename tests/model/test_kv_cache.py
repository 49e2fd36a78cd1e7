from __future__ import annotations

import pytest
import torch

from sfllm_worker.kv.cache import KVCache, bytes_per_block
from sfllm_worker.load.dummy import SHAPES
from sfllm_worker.model.config import ModelConfig

CONFIG = ModelConfig.from_hf(SHAPES["tiny-llama"])


def filled_cache() -> KVCache:
    cache = KVCache(CONFIG, num_blocks=6, block_size=4, dtype=torch.float32)
    for layer in cache.layers:
        for block in range(6):
            layer.k[block] = 10.0 * layer.index + block
            layer.v[block] = -(10.0 * layer.index + block)
    return cache


def contents(cache: KVCache) -> list[list[float]]:
    return [[float(layer.k[block].mean()) for block in range(6)] for layer in cache.layers]


def test_blocks_are_copied_in_every_layer_as_if_all_at_once() -> None:
    cache = filled_cache()
    cache.copy_blocks([(1, 4), (2, 1)])
    assert contents(cache) == [[0, 2, 2, 3, 1, 5], [10, 12, 12, 13, 11, 15]]
    assert all(torch.equal(layer.v, -layer.k) for layer in cache.layers)


def test_copying_one_block_leaves_the_others() -> None:
    cache = filled_cache()
    cache.copy_block(5, 2)
    assert contents(cache)[1] == [10, 11, 15, 13, 14, 15]


def test_cleared_blocks_lose_non_finite_values() -> None:
    cache = filled_cache()
    cache.layers[1].v[3] = float("nan")
    cache.zero_blocks([3])
    assert bool((cache.layers[1].v[3] == 0).all())
    assert contents(cache)[0] == [0, 1, 2, 0, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_block_is_what_the_tensors_take(dtype: torch.dtype) -> None:
    cache = KVCache(CONFIG, num_blocks=6, block_size=16, dtype=dtype)
    taken = sum(layer.k.nbytes + layer.v.nbytes for layer in cache.layers)
    assert taken == 6 * bytes_per_block(CONFIG, 16, dtype)


@pytest.mark.parametrize(("blocks", "size"), [(1, 16), (8, 0)])
def test_a_cache_without_room_is_refused(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        KVCache(CONFIG, blocks, size, torch.float32)
