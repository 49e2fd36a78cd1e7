"""Puts the weights of a model where native steps read them, in the form that suits the machine."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from sfllm_worker.large_pages import Copies
from sfllm_worker.model.layers import DenseLinear, Linear
from sfllm_worker.native import compressed
from sfllm_worker.native.panels import PanelLinear
from sfllm_worker.native.quantized_panels import QuantizedPanelLinear
from sfllm_worker.native.unpacked import may_keep
from sfllm_worker.quant.linear import QuantizedLinear


class Packing:
    """Packs linear layers one after the other, in the order in which a step reads them."""

    def __init__(self, library: ctypes.CDLL, linears: Sequence[Linear], dtype: torch.dtype) -> None:
        """For a model of these layers with activations of that type."""
        self._library = library
        # What only steps of many tokens read lies apart from what all read.
        self._copies, self._dense_copies = Copies(), Copies()
        self._compresses = compressed.is_served(library, dtype)
        dense = [linear for linear in linears if isinstance(linear, DenseLinear)]
        self._keeps_dense = self._compresses and may_keep(sum(linear.weight.nbytes for linear in dense))

    def pack(self, linear: Linear, unit: int) -> PanelLinear | QuantizedPanelLinear:
        """The same layer in panels, of which every `unit` rows begin a new one; the given one is used up.

        Raises TypeError for a kind that is not known.
        """
        if isinstance(linear, PanelLinear | QuantizedPanelLinear):
            return linear
        if isinstance(linear, QuantizedLinear):
            quantized = QuantizedPanelLinear(linear.weight, linear.bias, unit, linear.dtype)
            quantized.panels = quantized.panels._replace(data=self._copies.of(quantized.panels.data))
            return quantized
        if not isinstance(linear, DenseLinear):
            raise TypeError(f"{type(linear).__name__} has no plain weight")
        packed = PanelLinear(linear.weight, linear.bias, unit)
        self._place(packed)
        # Let go of at once, so that loading a model does not take its memory twice.
        linear.weight = linear.weight.new_empty(0, packed.in_features)
        return packed

    def _place(self, linear: PanelLinear) -> None:
        words = linear.words()
        if self._compresses:
            linear.compressed = compressed.compress(linear.matrix(), self._library, self._copies)
        if linear.compressed is None:
            linear.panels = self._copies.of(words)
        else:
            linear.panels = self._dense_copies.of(words) if self._keeps_dense else None
