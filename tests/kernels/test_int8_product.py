"""Products with int8 weights in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from product_references import assert_product, random_product, wide_product

from sfllm_worker.kernels.int8_product import Int8Linear
from sfllm_worker.kernels.scaled_product import quantize_rows
from sfllm_worker.quant.channels import ChannelLinear, quantize_channels

MANY = 65
"""Rows from which on activations are quantized."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 17, 64])
def test_few_rows_are_multiplied_with_the_weights_values(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = random_product(rows, 70, 600, dtype)
    quantized = quantize_channels(weight, torch.int8)
    layer = Int8Linear(quantized, bias if rows == 1 else None, dtype)
    assert_product(layer(x), x, quantized.dequantize(), layer.bias)


@pytest.mark.parametrize("size", [128, 150])
def test_many_rows_are_multiplied_as_integers(size: int) -> None:
    x, weight, bias = random_product(MANY, 130, size)
    quantized = quantize_channels(weight, torch.int8)
    values, scales = quantize_rows(x, torch.int8)
    rounded = values.double() * scales.double()[:, None]
    assert float(((rounded - x).abs() / scales[:, None]).max()) < 0.501
    product = Int8Linear(quantized, bias, torch.float32)(x)
    expected = wide_product(rounded, quantized.dequantize(), bias)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)


def test_the_largest_magnitude_of_a_row_is_127_and_a_row_of_zeros_stays_zero() -> None:
    x = torch.tensor([[3.0, -6.0, 1.0], [0.0, 0.0, 0.0]])
    values, scales = quantize_rows(x, torch.int8)
    assert values.tolist() == [[64, -127, 21], [0, 0, 0]]
    assert scales.tolist() == pytest.approx([6 / 127, 0])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_seen_in_its_results_and_spares_the_others(bad: float) -> None:
    x, weight, _ = random_product(MANY, 5, 20)
    x[3, 7] = bad
    result = Int8Linear(quantize_channels(weight, torch.int8), None, torch.float32)(x)
    assert not bool(result[3].isfinite().any())
    assert bool(torch.cat((result[:3], result[4:])).isfinite().all())


def test_deterministic_layers_never_quantize_activations() -> None:
    x, weight, _ = random_product(MANY, 20, 64)
    quantized = quantize_channels(weight, torch.int8)
    layer = Int8Linear(quantized, None, torch.float32, deterministic=True)
    assert_product(layer(x), x, quantized.dequantize(), None)
    assert torch.equal(layer(x[:1])[0], layer(x)[0])


def test_plain_torch_computes_the_same() -> None:
    x, weight, bias = random_product(3, 20, 64)
    quantized = quantize_channels(weight, torch.int8)
    layers = [kind(quantized, bias, torch.float32) for kind in (ChannelLinear, Int8Linear)]
    torch.testing.assert_close(layers[0](x), layers[1](x))
    assert [layer.weight_bytes for layer in layers] == [20 * 64 + 20 * 4 + 20 * 4] * 2
