"""Quantized layers as the native products read them; see `src/quantized_linear.h`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch import Tensor

from sfllm_worker.native import structures as s
from sfllm_worker.quant.panels import PANEL, pack_panels, panel_rows
from sfllm_worker.quant.weight import QuantizedWeight

_WORD_BYTES = 4


class QuantizedPanelLinear:
    """A linear layer over a quantized weight in panels; every `unit` rows begin a new one."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, unit: int, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        """Of the activations, to which weights are rounded when they are multiplied."""
        self.unit = unit
        self.panels = pack_panels(weight, unit)
        self.unpacked: Tensor | None = None
        """int32 `unpacked_shape`, if kept: the panels that `PanelLinear` has of the de-quantized weight."""
        padding = (0, -unit % PANEL)
        self.bias = None if bias is None else F.pad(bias.float().view(-1, unit), padding).flatten()

    @property
    def weight_bytes(self) -> int:
        """Memory that weight and bias take, without `unpacked`."""
        bias_bytes: int = 0 if self.bias is None else self.bias.nbytes
        return int(self.panels.data.nbytes) + bias_bytes

    @property
    def unpacked_shape(self) -> tuple[int, int, int]:
        """Panels, words of `dtype` in a row, and rows of a panel."""
        return len(self.panels.data), self.in_features * self.dtype.itemsize // _WORD_BYTES, PANEL

    @property
    def unpacked_bytes(self) -> int:
        """Memory that `unpacked` takes, or would."""
        return math.prod(self.unpacked_shape) * _WORD_BYTES

    @property
    def device(self) -> torch.device:
        """Where the weight lives."""
        return self.panels.data.device

    def __call__(self, x: Tensor) -> Tensor:
        """Map `x` `[n, in_features]` to `[n, out_features]`, by way of the plain weight: slow."""
        starts = torch.arange(0, self.out_features // self.unit) * (self.unit + -self.unit % PANEL)
        places = (starts[:, None] + torch.arange(self.unit)).flatten()
        bias = None if self.bias is None else self.bias[places].to(self.dtype)
        return F.linear(x, self.rows(places), bias)

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of the weight with what pads its units, int64 `[n]`, as `[n, in_features]` in `dtype`."""
        return panel_rows(self.panels, indices, self.in_features).dequantize().to(self.dtype)

    def matrix(self) -> s.Matrix:
        """What the native library is given; this object must live as long."""
        data = self.panels.data
        bias = None if self.bias is None else self.bias.data_ptr()
        unpacked = None if self.unpacked is None else self.unpacked.data_ptr()
        shape = len(data) * PANEL, self.in_features
        return s.Matrix(data.data_ptr(), bias, *shape, self.panels.kind, data[0].nbytes, unpacked)
