"""What the elementwise kernels compute, in float64, and how far their rounding may be from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""The relative error of one rounding; for float32 with room for sums in another order."""


def wide_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def wide_rotation(heads: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Rotate channels `i` and `i + dim / 2` of `[n, heads, head_dim]`, for `frequencies` `[dim / 2]`."""
    half = len(frequencies)
    heads = heads.double()
    # Angles as the model has them: products of float32, from where on all is exact.
    angles = (positions.to(torch.float32)[:, None] * frequencies).double()[:, None]
    low, high, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat((low * cosines - high * sines, high * cosines + low * sines, rest), dim=-1)


def wide_gated(gate_up: Tensor, kind: str) -> Tensor:
    """The gated product by the definitions of its activations."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    match kind:
        case "silu" | "swish":
            return gate / (1 + (-gate).exp()) * up
        case "gelu":
            return gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up
        case "gelu_pytorch_tanh":
            inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
            return gate * 0.5 * (1 + inner.tanh()) * up
    raise ValueError(kind)


def assert_rounded(ours: Tensor, wide: Tensor, roundings: int, scale: float = 0.0) -> None:
    """Fail where `ours` is further from `wide` than so many roundings, relative to the value or `scale`."""
    bound = roundings * UNIT_ROUNDOFF[ours.dtype] * (wide.abs() + scale) + torch.finfo(ours.dtype).tiny
    excess = (ours.double() - wide).abs() - bound
    assert bool((excess <= 0).all()), f"{float(excess.max()):.3g} beyond the bound"
