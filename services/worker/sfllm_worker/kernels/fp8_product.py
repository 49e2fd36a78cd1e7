"""Products with weights in fp8 (e4m3), a scale for each output.

As `int8_product.py`, with floats of eight bits (Micikevicius et al., "FP8 Formats for Deep Learning", 2022).
Where a GPU has no products of fp8, before compute capability 8.9, activations stay as they are for many rows
as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfllm_worker.kernels.scaled_product import LARGEST, scaled_product, scaled_variants
from sfllm_worker.kernels.variant import Variant
from sfllm_worker.kernels.weight_product import (
    FIXED_BYTES,
    FP8_SHIFT,
    SMALL,
    product_variants,
    weight_product,
)
from sfllm_worker.quant.channels import ChannelLinear, ChannelWeight

NATIVE_CAPABILITY = (8, 9)
"""The first compute capability with products of fp8."""


class Fp8Linear(ChannelLinear):
    """A linear layer over an fp8 weight."""

    def __init__(
        self,
        weight: ChannelWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        native: bool,
        deterministic: bool = False,
    ) -> None:
        """`native` says that the GPU has products of fp8. `deterministic` as for `Int8Linear`."""
        super().__init__(weight, bias, dtype)
        self._native = native
        self._deterministic = deterministic
        self._bytes = weight.values.view(torch.uint8)
        self._byte_scales = weight.scales * FP8_SHIFT

    def __call__(self, x: Tensor) -> Tensor:
        """Map `x` `[n, in_features]` to `[n, out_features]`."""
        small = next((SMALL[n] for n in SMALL if len(x) <= n), None)
        if small is None and self._native and not self._deterministic:
            return scaled_product(x, self.weight.values, self.weight.scales, self.bias)
        tiles = FIXED_BYTES if self._deterministic or small is None else small
        return weight_product(x, self._bytes, self._byte_scales, self.bias, tiles)


def variants() -> list[Variant]:
    """Weights alone in fp8, for a few rows and fixed; activations too, where the GPU has such products."""
    major, minor = NATIVE_CAPABILITY
    forms = scaled_variants("fp8_scaled", "fp8e4nv", LARGEST[torch.float8_e4m3fn], 10 * major + minor)
    for tiles in (*SMALL.values(), FIXED_BYTES):
        name = "fp8_fixed" if tiles is FIXED_BYTES else "fp8_product"
        forms += product_variants(name, "u8", tiles)
    return forms
