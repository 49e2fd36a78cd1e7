"""The building blocks of a decoder layer, as plain functions of tensors: no modules, no autograd."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch import Tensor


class Linear(Protocol):
    """A matrix product with fixed weights. Quantized and prepacked kinds implement the same call."""

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Map `x` `[n, in_features]` to `[n, out_features]`."""
        ...


class DenseLinear:
    """A linear layer over an unquantized weight `[out_features, in_features]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @property
    def weight_bytes(self) -> int:
        """Memory that weight and bias take."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        """Map `x` `[n, in_features]` to `[n, out_features]`."""
        return F.linear(x, self.weight, self.bias)


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The linear layer that suits a weight and its device; the one place where a kind is chosen."""
    return DenseLinear(weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019).

    Computed in float32 and rounded to `x.dtype` before the weight is applied: the order of operations
    that the Llama checkpoints were published with.
    """
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).to(x.dtype) * weight


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's product: silu of the first half of the last dimension times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
