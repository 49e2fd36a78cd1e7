"""Weights in eight bits with a scale for each output: the layout of the GPU's kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch import Tensor

CHANNEL_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Element types by the name of the quantization."""

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_CHUNK = 1 << 24
"""Elements that are worked on at once, in float32."""


class ChannelWeight(NamedTuple):
    """A weight `[rows, columns]`: each value times its row's scale."""

    values: Tensor
    """int8 or float8_e4m3fn `[rows, columns]`, contiguous."""
    scales: Tensor
    """float32 `[rows]`."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.values.nbytes + self.scales.nbytes

    def rows(self, indices: Tensor) -> Tensor:
        """Rows in float32, `[n, columns]` for int64 `[n]`."""
        # Bytes, because not every operation knows floats of eight bits.
        picked = self.values.view(torch.uint8).index_select(0, indices).view(self.values.dtype)
        return picked.to(torch.float32) * self.scales.index_select(0, indices)[:, None]

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        return self.values.to(torch.float32) * self.scales[:, None]


def quantize_channels(weight: Tensor, dtype: torch.dtype) -> ChannelWeight:
    """Round a weight `[rows, columns]`, of any float type, to int8 or float8_e4m3fn on its device.

    The scale is that of the row's largest magnitude. Raises ValueError for weights that are not finite.
    """
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    scales = torch.empty(rows, dtype=torch.float32, device=weight.device)
    count = max(1, _CHUNK // columns)
    for start in range(0, rows, count):
        part = slice(start, start + count)
        wide = weight[part].to(torch.float32)
        largest = wide.abs().amax(-1)
        scales[part] = largest / _LARGEST[dtype]
        scaled = wide / torch.where(largest > 0, scales[part], 1.0)[:, None]
        values[part] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    if weight.device.type != "meta" and not bool(torch.isfinite(scales).all()):
        raise ValueError("weights are not finite")
    return ChannelWeight(values, scales)


class ChannelLinear:
    """A linear layer in plain torch, whose weight becomes floats of `dtype` anew in each call.

    The GPU's kernels do the same without writing them; see `kernels/int8_product.py`.
    """

    def __init__(self, weight: ChannelWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight
        self.bias = bias
        self.dtype = dtype

    @property
    def weight_bytes(self) -> int:
        """Memory that weight and bias take."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        """Map `x` `[n, in_features]` to `[n, out_features]`."""
        return F.linear(x, self.weight.dequantize().to(self.dtype), self.bias)


class ChannelEmbedding:
    """Rows by token id of a weight that is the head's as well."""

    def __init__(self, weight: ChannelWeight, dtype: torch.dtype) -> None:
        self.weight = weight
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        """Where the weight lives."""
        return self.weight.values.device

    @property
    def nbytes(self) -> int:
        """Memory that the weight takes."""
        return self.weight.nbytes

    def __call__(self, token_ids: Tensor) -> Tensor:
        """`[n, hidden_size]` in `dtype` for int64 `[n]`."""
        return self.weight.rows(token_ids).to(self.dtype)
