"""Products in eight bits and with fixed tiles, and what eight bits lose in a whole model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from bench.gpu_check.checks import Check, Setting, name_of, noise_to_signal
from bench.gpu_check.models import tokens_of_text
from model_references import Sequences
from torch import Tensor

from sfllm_worker.kernels.fixed_product import FixedLinear
from sfllm_worker.kernels.fp8_product import NATIVE_CAPABILITY, Fp8Linear
from sfllm_worker.kernels.int8_product import Int8Linear
from sfllm_worker.load import load_model
from sfllm_worker.load.dummy import DummySource, dummy_config
from sfllm_worker.load.weights import build_weights
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.decoder import Decoder, TextModel
from sfllm_worker.model.layers import Linear, make_linear
from sfllm_worker.quant.channels import CHANNEL_TYPES, ChannelLinear, quantize_channels

# Noise relative to the results' spread. Rounding a result to 16 bits makes up to 0.002; eight bits with a
# scale for each output of normally distributed weights 0.01 (int8) and 0.03 (fp8), and once more where the
# rows of `x` are rounded as well.
MOST_NOISE = {"fixed": 0.005, "int8": 0.03, "fp8": 0.06}
LOSS_FACTOR = 2.0
"""How many times the noise of rounding the weights alone a whole model may have."""


def checks(setting: Setting) -> list[Check]:
    """Each kind of product in each format, and each quantization."""
    products = [
        Check(f"{kind} products {name_of(dtype)}", partial(product, setting, kind, dtype))
        for kind in MOST_NOISE
        for dtype in setting.dtypes
    ]
    return products + [
        Check(f"{name}: what a model loses", partial(loss, setting, name), needs_gpu=name == "fp8")
        for name in CHANNEL_TYPES
    ]


def product(setting: Setting, kind: str, dtype: torch.dtype) -> str:
    """Rows against float64 with the weights before they were rounded, in several batches.

    A row of a fixed product, or of one with `deterministic`, has the same bits in all of them.
    """
    sizes = [(1024, 4096), (2048, 1024), (3072, 1024), (576, 1536)] if setting.on_gpu else [(64, 80)]
    worst = 0.0
    for columns, outputs in sizes:
        generator = torch.Generator().manual_seed(columns)
        weight = (torch.randn(outputs, columns, generator=generator) / columns**0.5).to(dtype)
        x = torch.randn(300 if setting.on_gpu else 20, columns, generator=generator).to(dtype)
        expected = x.double() @ weight.double().T
        for deterministic in (False, True):
            layer = layer_of(setting, kind, weight.to(setting.device), deterministic)
            whole = layer(x.to(setting.device)).cpu()
            worst = max(worst, noise_to_signal(whole, expected))
            for count in (1, 7, 16, 130) if deterministic or kind == "fixed" else ():
                part = layer(x[:count].to(setting.device)).cpu()
                assert torch.equal(part, whole[:count]), f"rows differ in a batch of {count}"
    assert worst <= MOST_NOISE[kind], f"noise {worst:.4f} is over {MOST_NOISE[kind]}"
    return f"noise {worst:.4f} of the results' spread (at most {MOST_NOISE[kind]})"


def layer_of(setting: Setting, kind: str, weight: Tensor, deterministic: bool) -> Linear:
    """The layer as `--quantization` and `--deterministic` make it."""
    if kind == "fixed":
        return FixedLinear(weight)
    channels = quantize_channels(weight, CHANNEL_TYPES[kind])
    if kind == "int8":
        return Int8Linear(channels, None, weight.dtype, deterministic=deterministic)
    native = setting.on_gpu and torch.cuda.get_device_capability(setting.device) >= NATIVE_CAPABILITY
    return Fp8Linear(channels, None, weight.dtype, native=native, deterministic=deterministic)


@torch.inference_mode()
def loss(setting: Setting, name: str) -> str:
    """Teacher-forced logits of a quantized model against the exact one in float32 on the CPU.

    What rounding its weights costs by itself is found in plain torch, in float32.
    """
    kind = CHANNEL_TYPES[name]
    text = [token % 500 for token in tokens_of_text(60)]
    exact = logits_of(plain_decoder(make_linear), text)

    def rounded_layer(weight: Tensor, bias: Tensor | None) -> Linear:
        return ChannelLinear(quantize_channels(weight, kind), bias, weight.dtype)

    rounded = logits_of(plain_decoder(rounded_layer), text)
    dtype = "bfloat16" if setting.on_gpu else "float32"
    model = load_model(
        "tiny-qwen3", dtype=dtype, device=setting.device, load_format="dummy", quantization=name
    )
    ours = logits_of(model.decoder, text)
    noise, floor = noise_to_signal(ours, exact), noise_to_signal(rounded, exact)
    agreement = float((ours.cpu().argmax(-1) == exact.argmax(-1)).double().mean())
    found = f"noise {noise:.3f} of the logits' spread, by rounding weights alone {floor:.3f}"
    assert noise <= LOSS_FACTOR * floor, f"{found}: over {LOSS_FACTOR} times that"
    return f"{found}, {agreement:.0%} of the likeliest tokens the same"


def plain_decoder(make: Callable[[Tensor, Tensor | None], Linear]) -> Decoder:
    """The measured model in plain torch and float32 on the CPU."""
    config, cpu = ModelConfig.from_hf(dummy_config("tiny-qwen3")), torch.device("cpu")
    source = DummySource(0, torch.float32, cpu)
    return Decoder(config, build_weights(config, source, torch.float32, cpu, make_linear=make))


def logits_of(decoder: TextModel, text: list[int]) -> Tensor:
    """Logits of a text, the second half token by token."""
    run = Sequences(decoder, 1, 64)
    [chunk] = run.step([(0, text[:30])])
    return torch.cat([chunk, *(run.step([(0, [token])])[0] for token in text[30:])])
