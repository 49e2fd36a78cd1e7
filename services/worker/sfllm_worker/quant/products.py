"""Which kind of product computes with a model's weights, by the settings and the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sfllm_worker.backends import has_triton
from sfllm_worker.model.decoder import Decoder
from sfllm_worker.model.errors import ModelLoadError
from sfllm_worker.model.layers import Linear, make_linear
from sfllm_worker.quant.channels import CHANNEL_TYPES, ChannelLinear, ChannelWeight, quantize_channels
from sfllm_worker.quant.policy import BITS

LinearMaker = Callable[[Tensor, Tensor | None], Linear]
"""Makes a linear layer of a weight `[out_features, in_features]` on its device and a bias, if there is one.

Raises ValueError for a weight that cannot be quantized.
"""

FP8_CAPABILITY = (8, 0)
"""The first compute capability for fp8: older ones have no bfloat16."""


class Products(NamedTuple):
    """What is asked for: a key of `BITS`, and that a row's results do not depend on its batch."""

    quantization: str = "none"
    deterministic: bool = False

    def check(self, device: torch.device) -> None:
        """Raise ModelLoadError if the device cannot do it."""
        name = self.quantization
        if name not in BITS:
            raise ModelLoadError(f"unknown quantization: {name} (supported: {', '.join(BITS)})")
        if name == "fp8" and (
            device.type == "cpu"
            or (device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY)
        ):
            major, minor = FP8_CAPABILITY
            raise ModelLoadError(
                f"quantization fp8 needs a GPU of compute capability {major}.{minor} or more; "
                f"int8 runs on {device.type} as well"
            )
        if name == "int4" and device.type != "cpu":
            raise ModelLoadError(f"quantization int4 is for CPUs, and the model runs on {device.type}")
        if self.deterministic and device.type == "cuda" and not has_triton():
            raise ModelLoadError("deterministic results on a GPU need triton, which is not installed")

    def check_decoder(self, decoder: Decoder) -> None:
        """Raise ModelLoadError if the decoder's results depend on the batch and may not."""
        if self.deterministic and decoder.device.type == "cpu" and type(decoder) is Decoder:
            raise ModelLoadError(
                "deterministic results on a CPU need the native kernels, "
                f"which do not run here in {decoder.dtype}"
            )

    def stored_bits(self, device: torch.device) -> int | None:
        """Bits in which weights are quantized before they reach the device, None for none: those of CPUs."""
        return BITS[self.quantization] if device.type == "cpu" else None

    def maker(self, device: torch.device, dtype: torch.dtype) -> LinearMaker:
        """How the device's linear layers are made of weights in `dtype`."""
        if device.type == "cpu" or self == Products():
            return make_linear
        kind = CHANNEL_TYPES.get(self.quantization)
        if kind is None:
            return _fixed_maker()
        make = _channel_maker(kind, device, dtype, self.deterministic)
        return lambda weight, bias: make(quantize_channels(weight, kind), bias)


def _fixed_maker() -> LinearMaker:
    from sfllm_worker.kernels.fixed_product import FixedLinear  # noqa: PLC0415 - not on a CPU

    return FixedLinear


def _channel_maker(
    kind: torch.dtype, device: torch.device, dtype: torch.dtype, deterministic: bool
) -> Callable[[ChannelWeight, Tensor | None], ChannelLinear]:
    """Layers in Triton's kernels where it runs, else in plain torch."""
    if device.type != "cuda" or not has_triton():
        return lambda weight, bias: ChannelLinear(weight, bias, dtype)
    if kind == torch.int8:
        from sfllm_worker.kernels.int8_product import Int8Linear  # noqa: PLC0415 - not on a CPU

        return lambda weight, bias: Int8Linear(weight, bias, dtype, deterministic=deterministic)
    from sfllm_worker.kernels.fp8_product import NATIVE_CAPABILITY, Fp8Linear  # noqa: PLC0415 - not on a CPU

    native = torch.cuda.get_device_capability(device) >= NATIVE_CAPABILITY
    return lambda weight, bias: Fp8Linear(weight, bias, dtype, native=native, deterministic=deterministic)
