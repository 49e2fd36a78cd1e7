"""Quantized layers in plain torch: for machines without native kernels, and what those are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch import Tensor

from sfllm_worker.quant.weight import QuantizedWeight


class QuantizedLinear:
    """A linear layer over a quantized weight, which becomes floats of `dtype` anew in each call.

    Activations are not quantized. The native kernels round weights to `dtype` as well, so results differ
    only by the order of sums.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
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


class QuantizedEmbedding:
    """Rows of a quantized weight by token id."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        self.weight = weight
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that are looked up."""
        return self._dtype

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
        return self.weight.map_rows(lambda tensor: tensor[token_ids]).dequantize().to(self.dtype)
