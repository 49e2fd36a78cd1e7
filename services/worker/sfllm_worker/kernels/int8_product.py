"""Products with weights in int8, a scale for each output.

Few rows wait for the weights to be read: they become floats in registers, and activations stay as they are.
For many rows arithmetic is what takes time: activations are quantized as well, each row by its own scale
(LLM.int8() of Dettmers et al., 2022, without its outliers).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfllm_worker.kernels.scaled_product import LARGEST, scaled_product, scaled_variants
from sfllm_worker.kernels.variant import Variant
from sfllm_worker.kernels.weight_product import FIXED_BYTES, SMALL, product_variants, weight_product
from sfllm_worker.quant.channels import ChannelLinear, ChannelWeight


class Int8Linear(ChannelLinear):
    """A linear layer over an int8 weight."""

    def __init__(
        self, weight: ChannelWeight, bias: Tensor | None, dtype: torch.dtype, *, deterministic: bool = False
    ) -> None:
        """With `deterministic` a row's result has the same bits in any batch, and activations stay floats."""
        super().__init__(weight, bias, dtype)
        self._deterministic = deterministic

    def __call__(self, x: Tensor) -> Tensor:
        """Map `x` `[n, in_features]` to `[n, out_features]`."""
        tiles = FIXED_BYTES if self._deterministic else next((SMALL[n] for n in SMALL if len(x) <= n), None)
        if tiles is None:
            return scaled_product(x, self.weight.values, self.weight.scales, self.bias)
        return weight_product(x, self.weight.values, self.weight.scales, self.bias, tiles)


def variants() -> list[Variant]:
    """Weights alone in int8, for a few rows and deterministic; activations too, for many."""
    forms = scaled_variants("int8_scaled", "i8", LARGEST[torch.int8], 80)
    for tiles in (*SMALL.values(), FIXED_BYTES):
        name = "int8_fixed" if tiles is FIXED_BYTES else "int8_product"
        forms += product_variants(name, "i8", tiles)
    return forms
