"""Lays quantized weights out for the native kernels; `native/src/quantized.h` reads what is written here.

A panel is 32 output rows. For each group of 32 columns, one after the other, it holds 32 scales, 32
offsets if the weight has any, both float16, and then the values of each pair of columns `(2w, 2w + 1)`:

- eight bits: 64 bytes, the two columns of row 0, of row 1, and so on;
- four bits: 32 bytes. Of each half, bytes `0 .. 15` have the values of rows `0 .. 7` in that order in
  their lower bits, and those of rows `8 .. 15` in their upper bits.

So a weight is one run of memory, and what a vector of bytes widens to stands in the order in which pairs
of bfloat16 are wanted. Rows and groups that are missing are zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch import Tensor

from sfllm_worker.quant.weight import GROUP, QuantizedWeight

PANEL = 32
"""Output rows that lie side by side."""

DENSE, INT8, INT8_OFFSET, INT4, INT4_OFFSET, COMPRESSED = range(6)
"""`WeightKind` of `native/src/quantized.h`; dense and compressed is what is not quantized."""

_NUMBERS = {INT8: 1, INT8_OFFSET: 2, INT4: 1, INT4_OFFSET: 2}
"""Of each row in a group, before its values: the scale, the offset."""


class QuantizedPanels(NamedTuple):
    """A weight in panels."""

    kind: int
    data: Tensor
    """uint8 `[panels, groups, bytes]`."""


def pack_panels(weight: QuantizedWeight, unit: int | None = None) -> QuantizedPanels:
    """The weight in panels. Each `unit` rows begin a new panel, such as those of a head; None is all rows."""
    rows, columns = weight.shape
    unit = unit or rows
    padding, missing = -unit % PANEL, -columns % GROUP

    def panels(tensor: Tensor, pad_columns: int) -> Tensor:
        if padding or pad_columns:
            units = tensor.view(rows // unit, unit, -1)
            tensor = F.pad(units, (0, pad_columns, 0, padding))
        return tensor.reshape(-1, PANEL, tensor.shape[-1])

    values = panels(weight.values, missing)
    packed = _four_bits(values) if weight.bits == 4 else _transposed(values, PANEL)
    heads = [panels(t, 0) for t in (weight.scales, weight.offsets) if t is not None]
    # Per panel and group: the 32 rows' numbers, as bytes.
    heads = [head.transpose(1, 2).contiguous().view(torch.uint8) for head in heads]
    kinds = (INT8, INT8_OFFSET) if weight.bits == 8 else (INT4, INT4_OFFSET)
    return QuantizedPanels(kinds[weight.offsets is not None], torch.cat([*heads, packed], dim=2))


def panel_rows(panels: QuantizedPanels, rows: Tensor, columns: int) -> QuantizedWeight:
    """The given rows, int64 `[n]`, of the weight in the panels, which is `[32 * panels, columns]`."""
    panel, row = rows // PANEL, rows % PANEL
    count, groups, _ = panels.data.shape
    pairs = panels.data.view(torch.int16)
    numbers = _NUMBERS[panels.kind]
    heads = pairs[:, :, : numbers * PANEL].view(torch.float16).view(count, groups, numbers, PANEL)
    per_group = heads[panel, :, :, row].unbind(-1)
    packed = pairs[:, :, numbers * PANEL :].view(count, groups, GROUP // 2, -1)
    if panels.kind in (INT8, INT8_OFFSET):
        values = packed[panel, :, :, row].view(torch.int8)
    else:
        both = packed[panel, :, :, row // 16 * 8 + row % 8].view(torch.uint8)
        values = (both >> (row % 16 // 8 * 4).to(torch.uint8)[:, None, None]) & 15
    return QuantizedWeight(values.reshape(len(rows), -1)[:, :columns], *per_group)


def _four_bits(values: Tensor) -> Tensor:
    panels, _, columns = values.shape
    halves = values.view(panels, 2, 2, 8, columns)
    pairs = (halves[:, :, 1] << 4).bitwise_or_(halves[:, :, 0])
    return _transposed(pairs.view(panels, PANEL // 2, columns), PANEL // 2)


def _transposed(values: Tensor, rows: int) -> Tensor:
    """uint8 `[panels, groups, bytes]` of bytes `[panels, rows, columns]`: pairs of columns row by row."""
    panels, _, columns = values.shape
    pairs = values.contiguous().view(torch.int16)
    return pairs.transpose(1, 2).contiguous().view(torch.uint8).view(panels, columns // GROUP, GROUP * rows)
