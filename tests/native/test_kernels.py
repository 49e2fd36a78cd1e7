"""Each native kernel against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch import Tensor

from sfllm_worker.native import structures as s
from sfllm_worker.native.library import check
from sfllm_worker.native.panels import PanelLinear
from sfllm_worker.quant.panels import PANEL

DTYPES = [torch.float32, torch.bfloat16]
TYPES = {torch.float32: s.FLOAT32, torch.bfloat16: s.BFLOAT16}


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def linear(library: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None, threads: int = 2) -> Tensor:
    packed = PanelLinear(weight, bias, len(weight))
    out = torch.full((len(x), len(weight)), float("nan"))
    arguments = (x.data_ptr(), len(x), len(weight), out.data_ptr(), threads)
    check(library.sfllm_linear(TYPES[x.dtype], byref(packed.matrix()), *arguments))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 2), (7, 30), (66, 48), (130, 576), (33, 1538)])
def test_products_of_any_shape_equal_those_in_float64(
    library: ctypes.CDLL, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    weight, bias = random(outputs, inputs, seed=1).to(dtype), random(outputs, seed=2).to(dtype)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 13, 50, 241):
        x = random(tokens, inputs, seed=tokens).to(dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        ours = linear(library, x, weight, bias)
        # Products of bfloat16 are exact in float32, so that only the sums round.
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-6 * inputs**0.5 * 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_product_is_the_same_to_the_last_bit_in_any_batch(
    library: ctypes.CDLL, dtype: torch.dtype
) -> None:
    x, weight = random(250, 192).to(dtype), random(70, 192, seed=1).to(dtype)
    alone = torch.cat([linear(library, x[i : i + 1], weight, None) for i in range(len(x))])
    for count in (2, 3, 4, 5, 6, 9, 40, 250):
        assert torch.equal(linear(library, x[:count], weight, None), alone[:count])
    assert torch.equal(linear(library, x, weight, None, threads=1), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [1, 5, 16, 20, 40, 80])
def test_packing_into_panels_loses_nothing(dtype: torch.dtype, unit: int) -> None:
    weight, bias = random(80, 6).to(dtype), random(80, seed=1).to(dtype)
    packed = PanelLinear(weight, bias, unit)
    assert torch.equal(packed.dense(), weight)
    x = random(3, 6, seed=2).to(dtype)
    assert torch.equal(packed(x), F.linear(x, weight, bias))
    panels_of_a_unit = -(-unit // PANEL)
    assert len(packed.words()) == 80 // unit * panels_of_a_unit


@pytest.mark.parametrize("size", [1, 5, 16, 48, 576, 1031])
def test_norms_equal_those_in_float64(library: ctypes.CDLL, size: int) -> None:
    x, weight, out = random(3, size), random(size, seed=1), torch.full((3, size), float("nan"))
    library.sfllm_norm(x.data_ptr(), weight.data_ptr(), 1e-6, 3, size, out.data_ptr())
    exact = F.rms_norm(x.double(), (size,), weight.double(), 1e-6)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-7)


def test_a_norm_of_zeros_is_zero_and_of_nan_is_nan(library: ctypes.CDLL) -> None:
    x, weight, out = torch.zeros(2, 40), torch.ones(40), torch.full((2, 40), 7.0)
    x[1, 39] = float("nan")
    library.sfllm_norm(x.data_ptr(), weight.data_ptr(), 1e-6, 2, 40, out.data_ptr())
    assert not out[0].any()
    assert bool(out[1].isnan().all())


@pytest.mark.parametrize(
    ("number", "activation"),
    [(0, F.silu), (1, F.gelu), (2, lambda x: F.gelu(x, approximate="tanh"))],
    ids=["silu", "gelu", "gelu-tanh"],
)
@pytest.mark.parametrize("size", [3, 32, 50])
def test_gated_activations_equal_those_in_float64(
    library: ctypes.CDLL, number: int, activation: Callable[[Tensor], Tensor], size: int
) -> None:
    gate = torch.cat(
        (
            random(6, size, scale=3.0),
            torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])[:, None] + 0 * random(5, size),
        )
    )
    up = random(len(gate), size, seed=1)
    out = torch.full_like(up, float("nan"))
    both = torch.cat((gate, up), dim=1)
    library.sfllm_gated(both.data_ptr(), number, len(gate), size, out.data_ptr())
    exact = activation(gate.double()) * up.double()
    torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=1e-6)
