"""The sampled choice in Triton's interpreter: the tokens of `sampler.sample`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfllm.messages import Sampling
from sfllm_worker.kernels.choose import choose
from sfllm_worker.kernels.greedy import BLOCK, Chosen
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.parameters import ParameterTable
from sfllm_worker.sampling.philox import Purpose, uniforms
from sfllm_worker.sampling.sampler import sample

EDGE = 1e-4
"""Draws this close to a token's edge, in shares of all mass, may fall to either side by rounding."""


def row(position: int = 0, choice: int = 0, **fields: float) -> SamplingRow:
    sampling = Sampling(**{"max_tokens": 8, "seed": 1, **fields})  # type: ignore[arg-type]  # of each field
    return SamplingRow(sampling, choice, [0] * (position + 1), 1)


def chosen(logits: torch.Tensor, rows: list[SamplingRow]) -> Chosen:
    return choose(logits, torch.from_numpy(ParameterTable().fill(rows)))


def test_tokens_of_all_kinds_of_rows_are_those_of_the_sampler() -> None:
    generator = torch.Generator().manual_seed(3)
    kinds = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.3, "seed": -5},
        {"top_p": 0.9, "temperature": 1.5},
        {"top_k": 3},
        {"top_k": 50, "top_p": 0.8, "seed": 2**64 - 1},
        {"top_k": 2000, "top_p": 0.999},
        {"min_p": 0.05, "top_k": 900, "seed": 2**40},
        {"min_p": 0.2, "top_p": 0.7},
        {"top_p": 0.95, "top_k": 20, "temperature": 0.6},
    ]
    rows = [row(position=i, choice=i % 3, **fields) for i, fields in enumerate(kinds)]
    logits = torch.randn(len(rows), 2 * BLOCK + 100, generator=generator) * 3
    logits[::2] = (logits[::2] * 2).round() / 2  # many ties
    result = chosen(logits, rows)
    assert result.tokens.tolist() == sample(logits.clone(), rows).tokens
    assert result.sound.tolist() == [1] * len(rows)


ROWS = st.lists(
    st.one_of(st.integers(-12, 4).map(lambda n: n / 2), st.floats(-9, 2, width=32), st.just(-math.inf)),
    min_size=1,
    max_size=16,
)


@settings(max_examples=20, deadline=None)
@given(
    ROWS,
    st.integers(-(2**63), 2**64 - 1),
    st.floats(0.2, 2.0),
    st.sampled_from([1.0, 0.05, 0.6, 0.93]),
    st.sampled_from([0, 1, 2, 5, 16, 17]),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_a_token_is_that_of_the_sampler_unless_the_draw_is_on_its_edge(
    values: list[float], seed: int, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    logits = torch.tensor([values])
    one = row(seed=seed, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    result, expected = chosen(logits, [one]), sample(logits.clone(), [one])
    assert [bool(flag) for flag in result.sound] == expected.sound
    if expected.sound[0] and not is_close_to_an_edge(logits[0], one.sampling):
        assert result.tokens.tolist() == expected.tokens


def is_close_to_an_edge(logits: torch.Tensor, sampling: Sampling) -> bool:
    """Whether rounding may decide which tokens are kept, or which of them is drawn."""
    weights = torch.exp((logits.double() - logits.max()) / sampling.temperature)
    if bool(((weights - sampling.min_p).abs() < EDGE).any()) and sampling.min_p not in {0, 1}:
        return True
    order = weights.sort(descending=True).values
    order = order[order >= sampling.min_p]
    order = order[order >= order[min(sampling.top_k or len(order), len(order)) - 1]]
    shares = order.cumsum(0) / order.sum()
    if sampling.top_p < 1:
        if bool(((shares - sampling.top_p).abs() < EDGE).any()):
            return True
        order = order[order >= order[int((shares < sampling.top_p).sum())]]
    kept = torch.where(weights >= order[-1], weights, 0.0)
    [draw] = uniforms([sampling.seed], [0], [0], Purpose.SAMPLE)
    return bool(((kept.cumsum(0) / kept.sum() - float(draw)).abs() < EDGE).any()) or draw < EDGE


def test_frequencies_follow_the_distribution() -> None:
    draws = 60
    logits = torch.tensor([0.5, -math.inf, 1.5, 0.0])
    result = chosen(logits.repeat(draws, 1), [row(position=i, temperature=0.8) for i in range(draws)])
    counts = torch.bincount(result.tokens, minlength=4).double()
    assert counts[1] == 0
    expected = torch.softmax(logits.double() / 0.8, -1)[[0, 2, 3]] * draws
    assert float(((counts[[0, 2, 3]] - expected) ** 2 / expected).sum()) < 13.8  # 0.999, 2 degrees of freedom


def test_a_row_is_the_same_alone_and_beside_others_and_bad_ones_are_reported() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    logits[1, 49], logits[2] = math.nan, -math.inf
    rows = [row(position=i, seed=i, top_p=0.9) for i in range(4)]
    together = chosen(logits, rows)
    assert together.sound.tolist() == [1, 0, 0, 1]
    assert bool((together.tokens < 50).all())
    alone = chosen(logits[3:], rows[3:])
    assert alone.tokens.tolist() == together.tokens[3:].tolist()


def test_a_vocabulary_that_would_overflow_its_sums_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 2097152 tokens"):
        choose(torch.empty(1, 1).expand(1, 1 << 21), torch.empty(1, 8, dtype=torch.int64))
