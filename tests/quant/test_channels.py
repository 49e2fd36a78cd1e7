"""Weights with a scale for each output, as a GPU holds them, in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from model_references import Sequences
from torch import Tensor

from sfllm_worker import backends
from sfllm_worker.load import ModelLoadError, load_model
from sfllm_worker.load.dummy import DummySource
from sfllm_worker.load.weights import build_weights
from sfllm_worker.model.decoder import Decoder
from sfllm_worker.model.layers import DenseLinear, Linear
from sfllm_worker.native.decoder import NativeDecoder
from sfllm_worker.quant import products
from sfllm_worker.quant.channels import (
    CHANNEL_TYPES,
    ChannelEmbedding,
    ChannelLinear,
    quantize_channels,
)
from sfllm_worker.quant.products import Products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.5 / 127), ("fp8", 2.0**-4)])
def test_each_row_is_rounded_by_its_own_scale(kind: str, error: float) -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    weight *= 10.0 ** torch.arange(-3, 3)[:, None]
    weight[4] = 0
    quantized = quantize_channels(weight.to(torch.bfloat16), CHANNEL_TYPES[kind])
    exact = weight.to(torch.bfloat16).to(torch.float32)
    bound = error * exact.abs().amax(-1, keepdim=True) * 1.001
    assert bool(((quantized.dequantize() - exact).abs() <= bound).all())
    assert float(quantized.dequantize()[4].abs().sum()) == 0
    largest = exact.abs().amax(-1)
    torch.testing.assert_close(quantized.dequantize().abs().amax(-1), largest)
    assert quantized.nbytes == 6 * 40 + 6 * 4
    picked = torch.tensor([5, 0, 5])
    assert torch.equal(ChannelEmbedding(quantized, torch.float32)(picked), quantized.dequantize()[picked])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize_channels(weight, torch.int8)


@pytest.mark.parametrize("kind", CHANNEL_TYPES)
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3"])
def test_a_decoder_with_such_layers_is_that_of_the_rounded_weights(shape: str, kind: str) -> None:
    dtype = torch.float32

    def quantized(weight: Tensor, bias: Tensor | None) -> Linear:
        return ChannelLinear(quantize_channels(weight, CHANNEL_TYPES[kind]), bias, dtype)

    def rounded(weight: Tensor, bias: Tensor | None) -> Linear:
        weight.copy_(quantize_channels(weight, CHANNEL_TYPES[kind]).dequantize())
        return DenseLinear(weight, bias)

    config = load_model(shape, dtype="float32", load_format="dummy").config
    decoders = [
        Decoder(config, build_weights(config, DummySource(0, dtype, CPU), dtype, CPU, None, make))
        for make in (quantized, rounded)
    ]
    tied = isinstance(decoders[0].weights.embedding, ChannelEmbedding)
    assert tied == config.tie_word_embeddings
    results = [Sequences(decoder, 1, 64).step([(0, list(range(20)))])[0] for decoder in decoders]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert decoders[0].weight_bytes < decoders[1].weight_bytes / 2


def test_what_a_device_cannot_do_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [7, 5]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    monkeypatch.setattr(products, "has_triton", lambda: False)
    with pytest.raises(ModelLoadError, match="int4 is for CPUs, and the model runs on cuda"):
        Products("int4").check(CUDA)
    with pytest.raises(ModelLoadError, match=r"fp8 needs a GPU of compute capability 8\.0 or more"):
        Products("fp8").check(CUDA)
    with pytest.raises(ModelLoadError, match="need triton"):
        Products(deterministic=True).check(CUDA)
    Products("int8").check(CUDA)
    capability[:] = [8, 0]
    Products("fp8").check(CUDA)


def test_a_gpu_quantizes_what_a_cpu_would_be_given_in_groups() -> None:
    assert [Products(name).stored_bits(CPU) for name in ("none", "int8", "int4")] == [None, 8, 4]
    assert [Products(name).stored_bits(CUDA) for name in ("none", "int8", "fp8")] == [None, None, None]
    loaded = load_model(
        "tiny-qwen3", dtype="bfloat16", load_format="dummy", device="meta", quantization="fp8"
    )
    head = loaded.decoder.weights.head  # type: ignore[attr-defined]  # of the built-in decoder
    assert isinstance(head, ChannelLinear)
    assert head.weight.values.dtype == torch.float8_e4m3fn


def test_a_cpu_is_deterministic_only_with_its_native_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load_model("tiny-llama", dtype="float32", load_format="dummy", deterministic=True)
    if not isinstance(loaded.decoder, NativeDecoder):
        pytest.skip("no native kernels")
    monkeypatch.setattr(backends, "fitting_library", lambda *_: None)
    with pytest.raises(ModelLoadError, match="deterministic results on a CPU need the native kernels"):
        load_model("tiny-llama", dtype="float32", load_format="dummy", deterministic=True)
