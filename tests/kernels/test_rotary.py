"""The kernel between the product of queries, keys and values and attention, in Triton's interpreter."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from layer_references import assert_rounded, wide_norm, wide_rotation
from torch import Tensor

from sfllm_worker.kernels import rotary as kernel
from sfllm_worker.kernels.rotary import rotate_and_store, rotation_table
from sfllm_worker.kv.cache import KVLayer
from sfllm_worker.model.rope import Rotary, inverse_frequencies
from sfllm_worker.model.rope_config import DynamicScaling, LinearScaling, Rope, RopeScaling, YarnScaling

EPS = 1e-6
UNTOUCHED = 7.0
POSITIONS = torch.tensor([0, 3, 4095, 17])
SLOTS = torch.tensor([13, 6, 31, 0])


class Case(NamedTuple):
    heads: int
    kv_heads: int
    dim: int
    rotated: int
    norm: torch.dtype | None
    block_size: int = 4
    dtype: torch.dtype = torch.float32


CASES = {
    "plain": Case(6, 2, 8, 8, None),
    "more heads than a program's": Case(9, 3, 8, 8, None, block_size=16),
    "normed": Case(4, 2, 16, 16, torch.float32),
    "normed, odd sizes": Case(3, 3, 12, 12, torch.float32, block_size=5),
    "partly rotated": Case(4, 2, 24, 12, None),
    "partly rotated and normed": Case(4, 1, 16, 10, torch.float32),
    "not rotated": Case(5, 1, 16, 0, None),
    "not rotated but normed": Case(4, 2, 16, 0, torch.float32),
    "float16": Case(6, 2, 16, 16, None, dtype=torch.float16),
    "float16, normed": Case(6, 2, 16, 16, torch.float16, dtype=torch.float16),
    "float16, normed by float32": Case(6, 2, 16, 8, torch.float32, dtype=torch.float16),
}


class Run(NamedTuple):
    before: Tensor
    """`[n, heads, dim]`: what the product gave."""
    after: Tensor
    layer: KVLayer
    expected: Tensor
    """float64: normed and rotated queries and keys, then values."""


def run(case: Case) -> Run:
    generator = torch.Generator().manual_seed(3)
    total, turning = case.heads + 2 * case.kv_heads, case.heads + case.kv_heads
    # Rows that stand apart, as parts of wider ones do.
    wide = torch.randn(len(SLOTS), total * case.dim + 9, generator=generator).to(case.dtype)
    qkv = wide[:, : total * case.dim]
    before = qkv.reshape(-1, total, case.dim).clone()
    norm = None
    if case.norm is not None:
        norm = 1 + torch.randn(turning, case.dim, generator=generator).to(case.norm) / 4
    rope = Rope(100.0, case.rotated) if case.rotated else None
    table = None if rope is None else rotation_table(Rotary(rope), 4096, torch.device("cpu"))
    shape = (8, case.kv_heads, case.block_size, case.dim)
    layer = KVLayer(0, *(torch.full(shape, UNTOUCHED, dtype=case.dtype) for _ in "kv"))
    rotate_and_store(qkv, layer, SLOTS, POSITIONS, case.heads, table, norm, EPS)
    turned = before[:, :turning].double()
    if norm is not None:
        turned = wide_norm(turned, norm, EPS)
    if rope is not None:
        turned = wide_rotation(turned, POSITIONS, inverse_frequencies(rope))
    expected = torch.cat((turned, before[:, turning:].double()), dim=1)
    return Run(before, qkv.reshape(-1, total, case.dim), layer, expected)


@pytest.fixture(scope="module", params=CASES)
def done(request: pytest.FixtureRequest) -> tuple[Case, Run]:
    case = CASES[request.param]
    return case, run(case)


def test_queries_are_turned_in_place(done: tuple[Case, Run]) -> None:
    case, it = done
    # Two channels and up to three roundings take part in each result.
    queries = it.after[:, : case.heads]
    assert_rounded(queries, it.expected[:, : case.heads], roundings=3, scale=1.0)
    assert torch.equal(it.after[:, case.heads :], it.before[:, case.heads :])
    if not case.rotated and case.norm is None:
        assert torch.equal(queries, it.before[:, : case.heads])


def test_keys_and_values_are_at_their_slots_and_nothing_else_is_written(done: tuple[Case, Run]) -> None:
    case, it = done
    blocks, offsets = SLOTS // case.block_size, SLOTS % case.block_size
    first_value = case.heads + case.kv_heads
    keys, values = it.layer.k[blocks, :, offsets], it.layer.v[blocks, :, offsets]
    assert_rounded(keys, it.expected[:, case.heads : first_value], roundings=3, scale=1.0)
    assert torch.equal(values, it.before[:, first_value:])
    for cache in (it.layer.k, it.layer.v):
        cache[blocks, :, offsets] = UNTOUCHED
        assert bool((cache == UNTOUCHED).all())


@pytest.mark.parametrize(
    "scaling",
    [None, LinearScaling(3.0), DynamicScaling(4.0, 24), YarnScaling(4.0, 32, attention_factor=1.3)],
    ids=lambda scaling: type(scaling).__name__,
)
def test_a_table_holds_each_positions_rotation(
    scaling: RopeScaling | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_TABLE_ROWS_AT_ONCE", 40)  # so that a table has several parts
    rotary = Rotary(Rope(500.0, 12, scaling))
    table = rotation_table(rotary, 100, torch.device("cpu"))
    cosines, signed_sines = rotary.rotation(torch.arange(100), torch.float32)
    expected = torch.cat((cosines[:, 0, :6], signed_sines[:, 0, 6:]), dim=1)
    # Powers of a longer tensor may be rounded differently, and positions up to 100 multiply that.
    torch.testing.assert_close(table, expected, rtol=0, atol=5e-5 if scaling else 0)
