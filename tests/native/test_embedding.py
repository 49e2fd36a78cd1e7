"""Rows of embeddings as the library looks them up, against those of plain torch."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from sfllm_worker.native import structures as s
from sfllm_worker.native.attention import ELEMENT_TYPES
from sfllm_worker.native.panels import PanelEmbedding, PanelLinear
from sfllm_worker.native.quantized_panels import QuantizedPanelLinear
from sfllm_worker.quant.weight import GROUP, QuantizedWeight

VOCABULARY = 83  # ends within a panel
DTYPES = list(ELEMENT_TYPES)


def looked_up(
    library: ctypes.CDLL, matrix: s.Matrix, dtype: torch.dtype, ids: Tensor, scale: float = 1.0
) -> Tensor | None:
    """Float32 `[n, columns]`, or None where the library refuses an id."""
    out = torch.full((len(ids) + 1, matrix.columns), torch.nan)
    arguments = (VOCABULARY, ids.data_ptr(), len(ids), scale, out.data_ptr(), 2)
    refused = library.sfllm_embed(ELEMENT_TYPES[dtype], ctypes.byref(matrix), *arguments)
    assert out[-1].isnan().all()  # nothing is written behind the rows
    return None if refused else out[:-1]


def random_ids(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(count))


def random_quantized(bits: int, offset: bool, columns: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(columns)
    low, high, dtype = (0, 16, torch.uint8) if bits == 4 else (-128, 128, torch.int8)
    values = torch.randint(low, high, (VOCABULARY, columns), generator=generator, dtype=dtype)
    shape = (VOCABULARY, -(-columns // GROUP))
    scales, offsets = torch.randn((2, *shape), generator=generator).half()
    return QuantizedWeight(values, scales, offsets if offset else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [2, 46, 96])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_rows_of_a_plain_weight_and_of_one_in_panels_are_its_own_scaled(
    library: ctypes.CDLL, dtype: torch.dtype, columns: int, count: int
) -> None:
    weight = torch.randn(VOCABULARY, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    panels = PanelLinear(weight, None, VOCABULARY)
    plain = s.Matrix(weight.data_ptr(), None, *weight.shape, s.PLAIN_ROWS)
    ids = random_ids(count)
    for matrix in (plain, PanelEmbedding(panels).matrix()):
        for scale in (1.0, 24.125):
            ours = looked_up(library, matrix, dtype, ids, scale)
            assert ours is not None
            assert torch.equal(ours, weight[ids].float() * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [33, 64, 126])
@pytest.mark.parametrize("offset", [False, True], ids=["scale", "offset"])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_a_quantized_weight_are_rounded_as_its_products_round_it(
    library: ctypes.CDLL, dtype: torch.dtype, columns: int, offset: bool, bits: int
) -> None:
    weight = random_quantized(bits, offset, columns)
    embedding = PanelEmbedding(QuantizedPanelLinear(weight, None, VOCABULARY, dtype))
    ids = torch.arange(VOCABULARY)
    ours = looked_up(library, embedding.matrix(), dtype, ids)
    assert ours is not None
    assert torch.equal(ours, weight.dequantize().to(dtype).float())
    assert torch.equal(ours, embedding(ids).float())


@pytest.mark.parametrize("stranger", [-1, VOCABULARY, 2**40])
def test_an_id_outside_of_the_vocabulary_is_refused_before_anything_is_read(
    library: ctypes.CDLL, stranger: int
) -> None:
    weight = torch.ones(VOCABULARY, 4)
    matrix = PanelLinear(weight, None, VOCABULARY).matrix()
    assert looked_up(library, matrix, torch.float32, torch.tensor([3, stranger, 5])) is None
