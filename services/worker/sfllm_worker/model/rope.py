"""Rotary position embeddings (Su et al., "RoFormer", 2021) in the half-rotated layout of Hugging Face."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfllm_worker.model.rope_config import DynamicScaling, LinearScaling, Llama3Scaling, Rope, YarnScaling


class Rotary:
    """Makes the rotations of one kind of layer; they are shared by all its layers in a step."""

    def __init__(self, rope: Rope, device: torch.device | str = "cpu") -> None:
        self.dim = rope.dim
        self._theta = rope.theta
        self._dynamic = rope.scaling if isinstance(rope.scaling, DynamicScaling) else None
        self._attention_factor = attention_factor(rope)
        self._exponents = _exponents(rope).to(device)
        self._frequencies = inverse_frequencies(rope).to(device)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines for `positions` int64 `[n]`, each `[n, 1, dim]` in `dtype`.

        Angles are taken in float32. The first half of the sines is negated, so that `apply_rotation` is
        two products and a roll.
        """
        angles = positions.to(torch.float32)[:, None] * self._frequencies_at(positions)
        cosines, sines = angles.cos(), angles.sin()
        if self._attention_factor != 1.0:
            cosines, sines = cosines * self._attention_factor, sines * self._attention_factor
        doubled = torch.cat((cosines, cosines), dim=-1)
        signed = torch.cat((-sines, sines), dim=-1)
        return doubled.to(dtype).unsqueeze(1), signed.to(dtype).unsqueeze(1)

    def _frequencies_at(self, positions: Tensor) -> Tensor:
        """Frequencies `[dim / 2]`, or `[n, dim / 2]` where each position has its own."""
        scaling = self._dynamic
        if scaling is None:
            return self._frequencies
        lengths = (positions + 1).clamp(min=scaling.original_length).to(torch.float32)
        growth = scaling.factor * lengths / scaling.original_length - (scaling.factor - 1)
        bases = self._theta * growth ** (self.dim / (self.dim - 2))
        return 1.0 / bases[:, None] ** self._exponents


def _exponents(rope: Rope) -> Tensor:
    return torch.arange(0, rope.dim, 2, dtype=torch.int64).to(torch.float32) / rope.dim


def inverse_frequencies(rope: Rope) -> Tensor:
    """Rotation per position of each pair of channels, float32 `[dim / 2]`.

    With scaling applied, except for the dynamic kind, which depends on the position.
    """
    powers = rope.theta ** _exponents(rope)
    match rope.scaling:
        case None | DynamicScaling():
            return 1.0 / powers
        case LinearScaling(factor):
            return 1.0 / powers / factor
        case Llama3Scaling():
            return _llama3(1.0 / powers, rope.scaling)
        case YarnScaling():
            return _yarn(1.0 / powers, rope, rope.scaling)
    return 1.0 / (torch.tensor(rope.scaling.factors, dtype=torch.float32) * powers)


def attention_factor(rope: Rope) -> float:
    """What cosines and sines are multiplied by, so that scores grow with its square."""
    return float(getattr(rope.scaling, "attention_factor", 1.0))


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Long wavelengths are stretched, short ones kept, a ramp lies between."""
    original = scaling.original_length
    longest, shortest = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    ramp = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - ramp) * frequencies / scaling.factor + ramp * frequencies
    stretched = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, blended, stretched)


def _yarn(frequencies: Tensor, rope: Rope, scaling: YarnScaling) -> Tensor:
    """Channels that turn often within the original length are kept, slow ones stretched by the factor."""

    def channel(turns: float) -> float:
        """The (fractional) pair of channels that turns so often over the original length."""
        wavelength = scaling.original_length / turns
        return rope.dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    width = (last - first) or 0.001
    pairs = torch.arange(rope.dim // 2, dtype=torch.float32)
    stretched = ((pairs - first) / width).clamp(0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)


def apply_rotation(heads: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    """Rotate the first channels of `heads` `[n, heads, head_dim]` by the result of `Rotary.rotation`.

    Where all channels take part the result is a new tensor, otherwise `heads` itself, changed in place.
    """
    dim = cosines.shape[-1]
    if dim < heads.shape[-1]:
        heads[..., :dim] = apply_rotation(heads[..., :dim], cosines, signed_sines)
        return heads
    swapped = heads.roll(dim // 2, dims=-1)
    return (heads * cosines).addcmul_(swapped, signed_sines)
