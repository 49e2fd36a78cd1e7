"""Products whose results do not depend on the batch: for `--deterministic`.

Libraries choose tiles, and with them the order of sums, by the number of rows. Here there is one choice.
"""

from __future__ import annotations

from torch import Tensor

from sfllm_worker.kernels.variant import Variant
from sfllm_worker.kernels.weight_product import FIXED, product_variants, weight_product
from sfllm_worker.model.layers import DenseLinear


class FixedLinear(DenseLinear):
    """A linear layer over floats; a row's result has the same bits in any batch."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map `x` `[n, in_features]` to `[n, out_features]`."""
        return weight_product(x, self.weight, None, self.bias, FIXED)


def variants() -> list[Variant]:
    """All forms in 16 bits."""
    return product_variants("fixed_product", None, FIXED)
