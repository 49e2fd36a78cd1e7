"""The building blocks of a decoder layer, as plain functions of tensors: no modules, no autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """The linear layer that suits a weight of floats and its device; the one place where it is chosen."""
    return DenseLinear(weight, bias)


class Embedding(Protocol):
    """An embedding that is not a plain tensor, such as a quantized one."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that are looked up."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weight lives."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory that the weight takes."""
        ...

    def __call__(self, token_ids: Tensor) -> Tensor:
        """`[n, hidden_size]` for int64 `[n]`."""
        ...


def embed(token_ids: Tensor, embedding: Tensor | Embedding) -> Tensor:
    """The rows of the given tokens, int64 `[n]`."""
    return F.embedding(token_ids, embedding) if isinstance(embedding, Tensor) else embedding(token_ids)


def some_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of `x` by their numbers, int64 `[n]`; all of them for None."""
    return x if rows is None else x.index_select(0, rows)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019), computed in float32.

    A weight of `x`'s dtype is applied after rounding to it, as the Llama checkpoints expect; a float32
    weight before, as Gemma's do.
    """
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    if weight.dtype != x.dtype:
        return (wide * scale * weight).to(x.dtype)
    return (wide * scale).to(x.dtype) * weight


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Squash values smoothly into `(-cap, cap)`, in place."""
    return x.div_(cap).tanh_().mul_(cap)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's product: silu of the first half of the last dimension times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """GEGLU's product, with the exact gelu."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate).mul_(up)


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """GEGLU's product, with gelu's approximation by tanh."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": silu_and_mul,
    "swish": silu_and_mul,
    "gelu": gelu_and_mul,
    "gelu_pytorch_tanh": gelu_tanh_and_mul,
}
"""Gated products by the name of their activation in `config.json`."""
