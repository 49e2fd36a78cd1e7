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

INT8, INT8_OFFSET, INT4, INT4_OFFSET = 1, 2, 3, 4
"""`WeightKind` of `native/src/quantized.h`."""


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


def unpack_panels(panels: QuantizedPanels, columns: int) -> QuantizedWeight:
    """The weight in the panels, `[32 * panels, columns]`, with the rows that pad units."""
    count, groups, size = panels.data.shape
    offsets = panels.kind in (INT8_OFFSET, INT4_OFFSET)
    heads, packed = panels.data.split_with_sizes([64 + 64 * offsets, size - 64 - 64 * offsets], dim=2)
    halves = heads.contiguous().view(torch.float16).view(count, groups, -1, PANEL).permute(2, 0, 3, 1)
    pairs = packed.contiguous().view(torch.int16).view(count, groups * GROUP // 2, -1)
    values = pairs.transpose(1, 2).contiguous().view(torch.uint8)
    if panels.kind in (INT4, INT4_OFFSET):
        lower_upper = torch.stack((values & 15, values >> 4), dim=1)
        values = lower_upper.view(count, 2, 2, 8, -1).transpose(1, 2)
    else:
        values = values.view(torch.int8)
    rows = [half.reshape(count * PANEL, groups) for half in halves]
    return QuantizedWeight(values.reshape(count * PANEL, -1)[:, :columns], *rows)


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
