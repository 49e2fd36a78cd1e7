"""The product that does not depend on the batch, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from product_references import assert_product, random_product

from sfllm_worker.kernels import weight_product as module
from sfllm_worker.kernels.fixed_product import FixedLinear
from sfllm_worker.kernels.weight_product import FIXED, Tiles, weight_product

TINY = Tiles(rows=16, columns=16, depth=16, chunk=32, warps=4, stages=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [30, 64, 100])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_those_of_float64(dtype: torch.dtype, size: int, has_bias: bool) -> None:
    x, weight, bias = random_product(19, 20, size, dtype)
    given = bias if has_bias else None
    assert_product(weight_product(x, weight, None, given, TINY), x, weight, given)


def test_a_layer_takes_rows_of_any_stride_and_any_number_of_them() -> None:
    wide, weight, bias = random_product(70, 130, 2 * 260)
    x, weight = wide[:, 100:360], weight[:, :260].contiguous()
    layer = FixedLinear(weight, bias)
    assert_product(layer(x), x, weight, bias)
    assert layer(x[:0]).shape == (0, 130)
    assert layer.weight_bytes == weight.nbytes + bias.nbytes


@pytest.mark.parametrize("size", [96, 100])
def test_a_row_has_the_same_bits_in_any_batch(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Rows are the first of their tile: numpy, which multiplies here, treats places in a tile differently."""
    x, weight, bias = random_product(40, 20, size)
    results = []
    for enough_programs in (0, 1000):  # all chunks in one program, and a program for each
        monkeypatch.setattr(module, "_ENOUGH_PROGRAMS", enough_programs)
        results.append(weight_product(x, weight, None, bias, TINY))
        for row in (0, 16, 32):
            for end in (row + 1, row + 7):
                alone = weight_product(x[row:end], weight, None, bias, TINY)
                assert torch.equal(alone[0], results[0][row])
    assert torch.equal(*results)
    # That sums are cut is what makes them equal: one uncut sum has other bits.
    assert not torch.equal(weight_product(x, weight, None, bias, TINY._replace(chunk=128)), results[0])


def test_the_tiles_of_deterministic_products_cut_sums_where_steps_end() -> None:
    assert FIXED.chunk % FIXED.depth == 0
