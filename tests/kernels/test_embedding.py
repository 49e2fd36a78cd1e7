"""The embedding kernel in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from layer_references import assert_rounded, wide_norm

from sfllm_worker.kernels.embedding import embed_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [None, 6.9296875])
def test_rows_are_those_of_the_tokens_scaled_and_their_norm(dtype: torch.dtype, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    table, weight = torch.randn(30, 48, generator=generator).to(dtype), torch.rand(48, generator=generator)
    token_ids = torch.tensor([29, 0, 7, 7])
    hidden, normed = embed_norm(token_ids, table, scale, weight, 1e-6)
    expected = table[token_ids]
    assert torch.equal(hidden, expected if scale is None else expected * scale)
    assert_rounded(normed, wide_norm(hidden, weight, 1e-6), roundings=1)
    assert normed.dtype == dtype
