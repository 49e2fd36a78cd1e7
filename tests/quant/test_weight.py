"""Quantized weights and the quantizers, without a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfllm_worker.quant.linear import QuantizedEmbedding, QuantizedLinear
from sfllm_worker.quant.panels import PANEL, pack_panels, panel_rows
from sfllm_worker.quant.quantize import quantize
from sfllm_worker.quant.weight import GROUP, QuantizedWeight, stack


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_kind(kind: str, rows: int = 5, columns: int = 70, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    low, high, dtype = (0, 16, torch.uint8) if "4" in kind else (-128, 128, torch.int8)
    values = torch.randint(low, high, (rows, columns), generator=generator, dtype=dtype)
    groups = -(-columns // GROUP)
    scales, offsets = random(rows, groups, seed=seed).half(), random(rows, groups, seed=seed + 1).half()
    return QuantizedWeight(values, scales, offsets if "offset" in kind else None)


KINDS = ["int8", "int8-offset", "int4", "int4-offset"]


def test_a_weight_is_value_times_scale_plus_offset() -> None:
    values = torch.tensor([[0, 15] * 16 + [3]], dtype=torch.uint8)
    scales, offsets = torch.tensor([[0.5, 2.0]]).half(), torch.tensor([[-4.0, 1.0]]).half()
    assert QuantizedWeight(values, scales, offsets).dequantize().tolist() == [[-4.0, 3.5] * 16 + [7.0]]
    assert QuantizedWeight(values, scales).dequantize().tolist() == [[-4.0, 3.5] * 16 + [-10.0]]
    eight = QuantizedWeight(values.to(torch.int8) - 3, scales)
    assert eight.dequantize().tolist() == [[-1.5, 6.0] * 16 + [0.0]]


def test_scales_of_another_shape_or_format_are_refused() -> None:
    values = torch.zeros(2, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match="must be float16"):
        QuantizedWeight(values, torch.ones(2, 1).half())
    with pytest.raises(ValueError, match="must be float16"):
        QuantizedWeight(values, torch.ones(2, 2))


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_stacked_weights_of_any_kinds_keep_every_value(first: str, second: str) -> None:
    parts = [of_kind(first), of_kind(second, rows=3, seed=7)]
    exact = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(stack(parts).dequantize(), exact)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 100), st.integers(-12, 8), st.integers(0, 1000))
def test_eight_bits_are_off_by_half_a_step_at_most(rows: int, columns: int, exponent: int, seed: int) -> None:
    weight = random(rows, columns, seed=seed) * 2.0**exponent
    quantized = quantize(weight, 8)
    assert quantized.bits == 8
    steps = quantized.scales.float().repeat_interleave(GROUP, dim=1)[:, :columns]
    assert bool(((quantized.dequantize() - weight).abs() <= steps * 0.5001).all())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 100), st.integers(-8, 8), st.integers(0, 1000))
def test_four_bits_are_no_worse_than_rounding_within_the_range(
    rows: int, columns: int, exponent: int, seed: int
) -> None:
    weight = random(rows, columns, seed=seed) * 2.0**exponent
    quantized = quantize(weight, 4)
    assert quantized.bits == 4
    assert quantized.offsets is not None
    for start in range(0, columns, GROUP):
        group = weight[:, start : start + GROUP]
        low, high = group.aminmax(dim=1, keepdim=True)
        plain = ((group - low) / (high - low).clamp_min(1e-30) * 15).round() / 15 * (high - low) + low
        ours = quantized.dequantize()[:, start : start + GROUP]
        errors, bounds = ((x - group).square().sum(1) for x in (ours, plain))
        # In the fit of a short group some values count once more than others, at most twice as much;
        # scale and offset are rounded to float16.
        slack = 1.01 if group.shape[1] == GROUP else 2.02
        rounding = GROUP * (group.abs().amax(1) * 2.0**-10).square()
        assert bool((errors <= bounds * slack + rounding).all())


def test_four_bits_of_a_normal_distribution_lose_seven_percent() -> None:
    weight = random(64, 1024)
    loss = (quantize(weight, 4).dequantize() - weight).square().mean().sqrt() / weight.std()
    assert loss < 0.075


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_one_value_and_of_zeros_come_back(bits: int) -> None:
    weight = torch.tensor([0.0, 0.25, -3.0])[:, None].expand(3, 64)
    assert torch.allclose(quantize(weight, bits).dequantize(), weight, rtol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e6])
def test_weights_that_no_scale_can_hold_are_refused(bits: int, wrong: float) -> None:
    weight = random(4, 64)
    weight[2, 5] = wrong
    with pytest.raises(ValueError, match="not finite, or larger"):
        quantize(weight, bits)


def test_rows_are_quantized_alike_whatever_stands_beside_them() -> None:
    weight = random(9000, 40)  # more than is worked on at once
    whole, part = quantize(weight, 4), quantize(weight[8990:], 4)
    assert torch.equal(whole.dequantize()[8990:], part.dequantize())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_by_the_weight_rounded_to_its_dtype(kind: str, dtype: torch.dtype) -> None:
    weight, bias, x = of_kind(kind), random(5).to(dtype), random(3, 70).to(dtype)
    layer = QuantizedLinear(weight, bias, dtype)
    expected = torch.nn.functional.linear(x, weight.dequantize().to(dtype), bias)
    assert torch.equal(layer(x), expected)
    assert layer.weight_bytes == weight.nbytes + bias.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_gives_rows_of_its_weight(kind: str) -> None:
    weight, ids = of_kind(kind), torch.tensor([4, 0, 4, 1])
    rows = QuantizedEmbedding(weight, torch.bfloat16)(ids)
    assert torch.equal(rows, weight.dequantize().to(torch.bfloat16)[ids])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "unit"), [(5, 70, 5), (64, 64, 32), (80, 96, 40), (1, 1, 1)])
def test_panels_hold_every_value(kind: str, rows: int, columns: int, unit: int) -> None:
    weight = of_kind(kind, rows, columns)
    panels = pack_panels(weight, unit)
    everything = panel_rows(panels, torch.arange(len(panels.data) * PANEL), columns).dequantize()
    unpacked = everything.view(rows // unit, -1, columns)
    assert torch.equal(unpacked[:, :unit].reshape(rows, columns), weight.dequantize())
    assert not unpacked[:, unit:].any()
