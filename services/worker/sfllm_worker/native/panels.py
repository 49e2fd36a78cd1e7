"""Weights of linear layers in the layout that the native products read; see `src/linear.h`."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch import Tensor

from sfllm_worker.native import structures as s
from sfllm_worker.native.compressed import CompressedPanels
from sfllm_worker.native.quantized_panels import QuantizedPanelLinear
from sfllm_worker.quant.panels import DENSE, PANEL

_WORD_BYTES = 4


class PanelLinear:
    """A linear layer whose weight lies in panels: 32 rows side by side, a word of each after the other.

    Rows come in units (heads, or gates and what they are multiplied by); each unit is padded with zeros to
    whole panels, so that a native product can take a unit by its panels.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, unit: int) -> None:
        """Pack `weight` `[out_features, in_features]`, in units of `unit` rows. Columns must fill words."""
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.unit = unit
        rows = _pad_units(weight, unit).view(torch.int32)
        self.panels: Tensor | None = rows.view(-1, PANEL, rows.shape[1]).transpose(1, 2).contiguous()
        """int32 `[panels, words, 32]` of one float32 or two bfloat16; None if only `compressed` is kept."""
        self.compressed: CompressedPanels | None = None
        self.bias = None if bias is None else _pad_units(bias.to(torch.float32)[:, None], unit).flatten()

    @property
    def weight_bytes(self) -> int:
        """Memory that weight and bias take; without the dense panels if there are compressed ones."""
        bias_bytes: int = 0 if self.bias is None else self.bias.nbytes
        weight = self.words() if self.compressed is None else self.compressed.data
        return int(weight.nbytes) + bias_bytes

    @property
    def unpacked_bytes(self) -> int:
        """Memory that the dense panels take beside compressed ones."""
        return 0 if self.compressed is None or self.panels is None else self.panels.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Map `x` `[n, in_features]` to `[n, out_features]`, by way of the plain weight: slow."""
        bias = None if self.bias is None else self._without_padding(self.bias[:, None])[:, 0].to(self.dtype)
        return F.linear(x, self.dense(), bias)

    def dense(self) -> Tensor:
        """The plain weight `[out_features, in_features]`."""
        words = self.words()
        rows = words.transpose(1, 2).reshape(-1, words.shape[1]).contiguous()
        return self._without_padding(rows.view(self.dtype))

    def words(self) -> Tensor:
        """The dense panels, made anew if only compressed ones are kept."""
        if self.panels is not None:
            return self.panels
        assert self.compressed is not None
        return self.compressed.words()

    @property
    def device(self) -> torch.device:
        """Where the weight lives."""
        return torch.device("cpu")

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of the plain weight of a layer that is one unit: `[n, in_features]` for int64 `[n]`."""
        return self.words()[indices // PANEL, :, indices % PANEL].view(self.dtype)

    def matrix(self) -> s.Matrix:
        """What the native library is given; this object must live as long."""
        bias = None if self.bias is None else self.bias.data_ptr()
        panels = None if self.panels is None else self.panels.data_ptr()
        if self.compressed is not None:
            return self.compressed.matrix(bias, panels)
        words = self.words()
        return s.Matrix(panels, bias, len(words) * PANEL, self.in_features, DENSE, words[0].nbytes)

    def _without_padding(self, rows: Tensor) -> Tensor:
        padded = len(rows) * self.unit // self.out_features
        return rows.view(-1, padded, rows.shape[1])[:, : self.unit].reshape(self.out_features, -1)


class PanelEmbedding:
    """Rows of a head by token id, for models that have one weight for both."""

    def __init__(self, head: PanelLinear | QuantizedPanelLinear) -> None:
        self._head = head
        self.dtype = head.dtype
        self.device = head.device

    @property
    def nbytes(self) -> int:
        """Memory that the weight takes."""
        return self._head.weight_bytes

    def __call__(self, token_ids: Tensor) -> Tensor:
        """`[n, hidden_size]` for int64 `[n]`."""
        return self._head.rows(token_ids)

    def matrix(self) -> s.Matrix:
        """What the native library is given; this object must live as long."""
        return self._head.matrix()


def columns_fill_words(columns: int, dtype: torch.dtype) -> bool:
    """Whether a row of so many elements can be cut into words."""
    return columns * dtype.itemsize % _WORD_BYTES == 0


def _pad_units(rows: Tensor, unit: int) -> Tensor:
    """Rows `[n, columns]` with every `unit` rows filled up with zeros to whole panels."""
    return F.pad(rows.reshape(-1, unit, rows.shape[1]), (0, 0, 0, -unit % PANEL)).flatten(0, 1).contiguous()
