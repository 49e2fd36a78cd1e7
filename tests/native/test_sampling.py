"""The native choice of tokens against the one in torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfllm.messages import Sampling
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.native import can_choose_natively, choose_natively
from sfllm_worker.sampling.philox import Purpose, uniforms
from sfllm_worker.sampling.sampler import choose_in_torch


@pytest.fixture(autouse=True)
def _needs_the_library() -> None:
    if not can_choose_natively(torch.zeros(1, 1)):
        pytest.skip("no native kernels here")


def row(position: int = 0, choice: int = 0, **fields: object) -> SamplingRow:
    return SamplingRow(Sampling(**{"max_tokens": 8, "seed": 1, **fields}), choice, [0] * position, 0)


def peaked(rows: int, vocab: int, seed: int) -> Tensor:
    """Logits as models have them: few likely tokens and a long tail."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(vocab, generator=generator)
    return torch.randn(rows, vocab, generator=generator).sort().values[:, order] * 4


def assert_same(logits: Tensor, rows: list[SamplingRow]) -> None:
    """Ours are the tokens that torch chooses, or chooses for logits that are hardly different.

    A random number that falls on the edge between two tokens goes to either, as the sums are rounded.
    """
    theirs, their_sound = choose_in_torch(logits.clone(), rows)
    ours, our_sound = choose_natively(logits.clone(), rows)
    assert our_sound == their_sound
    different = [i for i, sound in enumerate(our_sound) if sound and ours[i] != theirs[i]]
    assert len(different) <= 1 + len(rows) // 100
    for i in different:
        nearly = [choose_in_torch(logits[i : i + 1] * (1 + e), [rows[i]])[0][0] for e in (-1e-5, 1e-5)]
        assert ours[i] in nearly


FILTERS = [
    {},
    {"temperature": 0.0},
    {"temperature": 1e-6},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 10_000_000},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.999, "temperature": 1.4},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 500, 4097])
def test_tokens_equal_those_that_torch_chooses(vocab: int, fields: dict[str, float]) -> None:
    count = 200
    rows = [row(position=i, seed=i * 7919, choice=i % 3, **fields) for i in range(count)]
    assert_same(peaked(count, vocab, seed=vocab), rows)


def test_rows_of_different_settings_share_a_call() -> None:
    rows = [row(position=i, seed=-i, **FILTERS[i % len(FILTERS)]) for i in range(130)]
    assert_same(peaked(130, 49152, seed=3), rows)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**20),
    choice=st.integers(0, 127),
    temperature=st.floats(0.05, 2.0),
    top_p=st.floats(0.01, 1.0),
    top_k=st.integers(0, 60),
    min_p=st.floats(0.0, 1.0),
)
def test_any_settings_choose_the_token_that_torch_chooses(
    seed: int, position: int, choice: int, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    settings_of_row = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    assert_same(
        peaked(1, 300, seed=position), [row(seed=seed, position=position, choice=choice, **settings_of_row)]
    )


def test_banned_tokens_are_never_chosen_and_ties_are_all_kept() -> None:
    logits = torch.full((400, 70), float("-inf"))
    logits[:, 3], logits[:, 40], logits[:, 69] = 1.0, 1.0, 1.0
    rows = [row(position=i, top_k=2) for i in range(400)]
    assert_same(logits, rows)
    assert set(choose_natively(logits, rows)[0]) == {3, 40, 69}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 17, 68])
def test_rows_that_are_not_finite_are_not_sound(bad: float, place: int) -> None:
    logits = peaked(3, 69, seed=1)
    logits[1, place] = bad
    logits[2] = float("-inf")
    for fields in ({"temperature": 0.0}, {"top_p": 0.5}):
        assert choose_natively(logits.clone(), [row(**fields)] * 3)[1] == [True, False, False]


def test_the_random_numbers_are_those_of_the_python_generator() -> None:
    # With even weights over 2**16 tokens the token is the number's upper bits.
    vocab = 1 << 16
    seeds, choices, positions = [0, 1, -5, 2**63 - 1], [0, 1, 2, 127], [0, 9, 1000, 70000]
    rows = [
        row(seed=seed, choice=choice, position=position)
        for seed, choice, position in zip(seeds, choices, positions, strict=True)
    ]
    tokens, _ = choose_natively(torch.zeros(4, vocab), rows)
    expected = uniforms(seeds, choices, positions, Purpose.SAMPLE) * vocab
    assert tokens == [int(value) for value in expected]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 500, 4097])
def test_a_mask_leaves_the_tokens_whose_bit_is_set(vocab: int, temperature: float) -> None:
    count = 50
    rows = [row(position, temperature=temperature) for position in range(count)]
    words = np.random.default_rng(vocab).integers(
        -(2**63), 2**63 - 1, (count, -(-vocab // 64)), dtype=np.int64
    )
    words[:, 0] |= 1
    logits = peaked(count, vocab, seed=3)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=vocab)
    masked = logits.masked_fill(torch.from_numpy(bits) == 0, -torch.inf)
    expected = choose_natively(masked, rows)
    assert choose_natively(logits, rows, dict(enumerate(words))) == expected


def test_a_row_without_a_mask_stands_beside_one_with_and_a_token_that_may_not_come_may_be_anything() -> None:
    logits = torch.tensor([[math.nan, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    masks = {0: np.array([0b010]), 2: np.array([0b000])}
    tokens, sound = choose_natively(logits, [row(temperature=0.0)] * 3, masks)
    assert sound == [True, True, False], "nothing at all may come in the last row"
    assert tokens[:2] == [1, 2]
