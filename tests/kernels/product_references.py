"""Products in float64, and how far those of a shorter format may be from them."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDOFF = {torch.float32: 2.0**-23, torch.float16: 2.0**-11}


def wide_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias`."""
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


def assert_product(ours: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Fail where sums in float32, rounded once, could not give `ours`."""
    wide = wide_product(x, weight, bias)
    magnitudes = wide_product(x.abs(), weight.abs(), None if bias is None else bias.abs())
    bound = ROUNDOFF[ours.dtype] * wide.abs() + 8 * ROUNDOFF[torch.float32] * magnitudes + 1e-30
    excess = (ours.double() - wide).abs() - bound
    assert float(excess.max()) <= 0, f"{float(excess.max()):.3g} beyond the bound"


def random_product(
    rows: int, columns: int, size: int, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations `[rows, size]`, a weight `[columns, size]` and a bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, size), (columns, size), (columns,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias
