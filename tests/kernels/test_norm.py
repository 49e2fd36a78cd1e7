"""The norm kernel in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from layer_references import assert_rounded, wide_norm
from torch import Tensor

from sfllm_worker.kernels.norm import add_norm, row_warps
from sfllm_worker.model.layers import rms_norm

DTYPES = [torch.float32, torch.float16]
EPS = 1e-5


def rows(count: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    return 1 + rows(1, size, dtype, seed)[0] / 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 48, 64, 1100])
def test_rows_are_normed_and_left_alone(dtype: torch.dtype, weight_dtype: torch.dtype, size: int) -> None:
    residual, weight = 3 * rows(3, size, dtype, seed=1), weights(size, weight_dtype, seed=2)
    before = residual.clone()
    normed = add_norm(residual, weight, EPS)
    assert normed.dtype == dtype
    assert_rounded(normed, wide_norm(before, weight, EPS), roundings=2)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("post_dtype", [None, *DTYPES])
def test_what_is_added_goes_into_the_residual_before_the_norm(
    dtype: torch.dtype, post_dtype: torch.dtype | None
) -> None:
    residual, added = rows(4, 80, dtype, seed=1), 5 * rows(4, 80, dtype, seed=2)
    weight = weights(80, torch.float32, seed=3)
    post = None if post_dtype is None else weights(80, post_dtype, seed=4)
    joining = added.double() if post is None else wide_norm(added, post, EPS)
    total = residual.double() + joining
    normed = add_norm(residual, weight, EPS, added, post)
    assert_rounded(residual, total, roundings=1, scale=2 * float(joining.abs().max()))
    assert_rounded(normed, wide_norm(residual, weight, EPS), roundings=1)


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weights_of_the_rows_dtype_follow_a_rounding_and_others_come_before_it(
    weight_dtype: torch.dtype,
) -> None:
    x = rows(4, 64, torch.float16, seed=5)
    weight = weights(64, torch.float16, seed=6).to(weight_dtype)
    share = (add_norm(x, weight, EPS) == rms_norm(x, weight, EPS)).double().mean()
    # A sum in another order may tip a rounding here and there; the other convention changes a third of all.
    assert float(share) > 0.95


def test_rows_of_any_stride_are_read_and_written_in_place() -> None:
    size, dtype = 20, torch.float32
    wide, added_wide, out_wide = (rows(3, 33, dtype, seed) for seed in (1, 2, 3))
    residual, added, out = wide[:, :size], added_wide[:, 5 : 5 + size], out_wide[:, 3 : 3 + size]
    beside = wide[:, size:].clone(), out_wide[:, :3].clone(), out_wide[:, 3 + size :].clone()
    weight, total = weights(size, dtype, seed=4), residual + added
    result = add_norm(residual, weight, EPS, added, out=out)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(residual, total)
    assert_rounded(out, wide_norm(total, weight, EPS), roundings=2)
    for part, before in zip((wide[:, size:], out_wide[:, :3], out_wide[:, 3 + size :]), beside, strict=True):
        assert torch.equal(part, before)


def test_float16_rows_whose_squares_overflow_are_normed() -> None:
    x = torch.full((1, 32), 60000.0, dtype=torch.float16)
    assert_rounded(add_norm(x, torch.ones(32, dtype=torch.float16), EPS), torch.ones(1, 32).double(), 2)


def test_a_row_gets_a_warp_for_256_elements_up_to_16() -> None:
    assert [row_warps(width) for width in (1, 256, 1024, 4096, 32768)] == [1, 1, 4, 16, 16]
