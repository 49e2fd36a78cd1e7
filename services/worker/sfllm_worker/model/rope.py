"""Rotary position embeddings (Su et al., "RoFormer", 2021) in the half-rotated layout of Hugging Face."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfllm_worker.model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Rotation per position of each pair of channels, float32 `[head_dim / 2]`, with scaling applied."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is not None:
        frequencies = (
            _llama3(frequencies, scaling) if scaling.kind == "llama3" else frequencies / scaling.factor
        )
    return frequencies.to(device)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: long wavelengths are stretched, short ones kept, a ramp lies between."""
    original = scaling.original_max_position_embeddings
    longest, shortest = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    ramp = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - ramp) * frequencies / scaling.factor + ramp * frequencies
    stretched = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, blended, stretched)


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for `positions` int64 `[n]`, each `[n, 1, head_dim]` in `dtype`.

    Angles are taken in float32. The first half of the sines is negated, so that `apply_rotation` is two
    products and a roll.
    """
    angles = positions.to(torch.float32)[:, None] * frequencies
    cosines, sines = angles.cos(), angles.sin()
    doubled = torch.cat((cosines, cosines), dim=-1)
    signed = torch.cat((-sines, sines), dim=-1)
    return doubled.to(dtype).unsqueeze(1), signed.to(dtype).unsqueeze(1)


def apply_rotation(heads: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    """Rotate `heads` `[n, heads, head_dim]` by the result of `rotation`."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return (heads * cosines).addcmul_(swapped, signed_sines)
