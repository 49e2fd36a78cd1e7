"""A quantized weight: small integers, and for each run of columns a scale and perhaps an offset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
"""Columns of a row that share a scale, as in GGUF's simple block types."""

_MIDDLE = 8
"""What stands for zero among four-bit values without an offset."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `[rows, columns]` as integers; the columns of a row share scales in groups of `GROUP`.

    The last group is shorter when the columns do not divide. A weight is `value * scale + offset`, or,
    without offsets, `value * scale` of eight bits and `(value - 8) * scale` of four.
    """

    values: Tensor
    """`[rows, columns]`: int8, or uint8 for four bits (0 .. 15)."""
    scales: Tensor
    """float16 `[rows, groups]`. Sixteen bits are enough: quantizers choose values for the rounded scale."""
    offsets: Tensor | None = None
    """float16 `[rows, groups]`."""

    def __post_init__(self) -> None:
        """Check the shapes. Raises ValueError."""
        rows, columns = self.values.shape
        shape = (rows, -(-columns // GROUP))
        if any(
            t.shape != shape or t.dtype != torch.float16 for t in (self.scales, self.offsets) if t is not None
        ):
            raise ValueError(f"scales and offsets of {rows} x {columns} values must be float16 {shape}")

    @property
    def bits(self) -> int:
        """Of each value: 4 or 8."""
        return 4 if self.values.dtype == torch.uint8 else 8

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.values.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        """Memory that it takes in this form, which has a byte for each value."""
        return self.values.nbytes + self.scales.nbytes + (0 if self.offsets is None else self.offsets.nbytes)

    def dequantize(self) -> Tensor:
        """The weight in float32; where values came from GGUF blocks, to the last bit what GGUF defines."""
        columns = self.values.shape[1]
        values = self.values.to(torch.float32)
        if self.bits == 4 and self.offsets is None:
            values -= _MIDDLE
        # An integer of eight bits times a float16 is exact in float32: at most the offset's sum rounds.
        values *= _widened(self.scales, columns)
        return values if self.offsets is None else values.add_(_widened(self.offsets, columns))

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        """The weight with rows selected or reordered by `change`, which is called for each tensor."""
        offsets = None if self.offsets is None else change(self.offsets)
        return QuantizedWeight(change(self.values), change(self.scales), offsets)

    def with_offsets(self) -> QuantizedWeight:
        """The same weight in a form that has offsets; exact."""
        if self.offsets is not None:
            return self
        offsets = -_MIDDLE * self.scales if self.bits == 4 else torch.zeros_like(self.scales)
        return QuantizedWeight(self.values, self.scales, offsets)

    def with_eight_bits(self) -> QuantizedWeight:
        """The same weight with values of eight bits; exact."""
        if self.bits == 8:
            return self
        middle = _MIDDLE if self.offsets is None else 0
        return QuantizedWeight(self.values.to(torch.int8) - middle, self.scales, self.offsets)


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Rows of several weights as one, in the smallest form that holds all of them exactly."""
    if len({weight.bits for weight in weights}) > 1:
        weights = [weight.with_eight_bits() for weight in weights]
    if len({weight.offsets is None for weight in weights}) > 1:
        weights = [weight.with_offsets() for weight in weights]
    if len(weights) == 1:
        return weights[0]
    offsets = [weight.offsets for weight in weights if weight.offsets is not None]
    return QuantizedWeight(
        torch.cat([weight.values for weight in weights]),
        torch.cat([weight.scales for weight in weights]),
        torch.cat(offsets) if offsets else None,
    )


def _widened(per_group: Tensor, columns: int) -> Tensor:
    """float32 `[rows, columns]` of what each group has one of."""
    return per_group.to(torch.float32).repeat_interleave(GROUP, dim=1)[:, :columns]
