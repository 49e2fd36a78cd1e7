"""The gated product in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from layer_references import assert_rounded, wide_gated

from sfllm_worker.kernels.activation import KINDS, gated_product
from sfllm_worker.model.layers import ACTIVATIONS


def test_the_kernel_knows_every_activation_of_the_models() -> None:
    assert set(KINDS) == set(ACTIVATIONS)


INFINITIES = pytest.mark.filterwarnings("ignore:overflow encountered")
"""Exponentials of large gates are infinite on purpose: their share of the gate is then zero."""


@INFINITIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_products_are_those_of_the_definition(kind: str, dtype: torch.dtype) -> None:
    size = 1030  # more than one program's
    gate_up = 3 * torch.randn(2, 2 * size, generator=torch.Generator().manual_seed(1)).to(dtype)
    product = gated_product(gate_up, kind)
    assert (product.shape, product.dtype) == ((2, size), dtype)
    # A gelu of a very negative gate is a difference that float32 keeps to a part in the gate's size.
    scale = float(gate_up.abs().max()) if dtype == torch.float32 else 0.0
    assert_rounded(product, wide_gated(gate_up, kind), roundings=1, scale=scale)


@INFINITIES
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_extreme_gates_pass_the_other_half_or_nothing(kind: str) -> None:
    gates = torch.tensor([-60000.0, -300.0, 0.0, 300.0, 1e30])
    [product] = gated_product(torch.cat((gates, torch.full((5,), 2.0)))[None], kind)
    assert product.tolist() == pytest.approx([0, 0, 0, 600, 2e30])


def test_rows_of_any_stride_are_read_and_written() -> None:
    wide = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    out_wide = torch.zeros(3, 16)
    out = gated_product(wide[:, 4:24], "silu", out=out_wide[:, 2:12])
    assert_rounded(out, wide_gated(wide[:, 4:24], "silu"), roundings=2)
    assert out.data_ptr() == out_wide[:, 2:].data_ptr()
    assert float(out_wide[:, :2].abs().sum() + out_wide[:, 12:].abs().sum()) == 0
