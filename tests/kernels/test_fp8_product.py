"""Products with fp8 weights in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from product_references import assert_product, random_product, wide_product

from sfllm_worker.kernels.fp8_product import Fp8Linear
from sfllm_worker.kernels.scaled_product import quantize_rows
from sfllm_worker.kernels.weight_product import FP8_SHIFT, SMALL, weight_product
from sfllm_worker.quant.channels import quantize_channels

FP8 = torch.float8_e4m3fn
MANY = 65
"""Rows from which on activations are quantized where the GPU has products of fp8."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_byte_becomes_its_value(dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[numbers.view(FP8).to(torch.float32).isfinite()]
    result = weight_product(
        torch.ones(1, 1, dtype=dtype),
        numbers[:, None].contiguous(),
        torch.full((254,), FP8_SHIFT),
        None,
        SMALL[16],
    )
    assert result[0].tolist() == numbers.view(FP8).to(torch.float32).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "native"), [(2, True), (20, False), (MANY, False)])
def test_activations_stay_as_they_are_for_few_rows_or_without_products_of_fp8(
    rows: int, native: bool, dtype: torch.dtype
) -> None:
    x, weight, bias = random_product(rows, 70, 150, dtype)
    quantized = quantize_channels(weight, FP8)
    layer = Fp8Linear(quantized, bias if native else None, dtype, native=native)
    assert_product(layer(x), x, quantized.dequantize(), layer.bias)


@pytest.mark.parametrize("size", [128, 150])
def test_many_rows_are_multiplied_in_fp8(size: int) -> None:
    """Activations are chosen that need no rounding: the interpreter's is wrong where a mantissa carries."""
    x, weight, bias = random_product(MANY, 130, size)
    x = (8 * x).to(FP8).to(torch.float32)
    x[:, 0] = 448.0
    x *= 2.0 ** torch.arange(-30, MANY - 30)[:, None]
    values, scales = quantize_rows(x, FP8)
    assert torch.equal(values.to(torch.float32) * scales[:, None], x)
    quantized = quantize_channels(weight, FP8)
    product = Fp8Linear(quantized, bias, torch.float32, native=True)(x)
    expected = wide_product(x, quantized.dequantize(), bias)
    magnitude = wide_product(x.abs(), quantized.dequantize().abs(), bias.abs())
    assert float(((product - expected).abs() / magnitude).max()) < 1e-6


def test_deterministic_layers_never_quantize_activations() -> None:
    x, weight, _ = random_product(MANY, 20, 64)
    quantized = quantize_channels(weight, FP8)
    layer = Fp8Linear(quantized, None, torch.float32, native=True, deterministic=True)
    assert_product(layer(x), x, quantized.dequantize(), None)
    assert torch.equal(layer(x[:1])[0], layer(x)[0])
