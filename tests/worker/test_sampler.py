import math

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfllm.messages import Sampling
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.sampler import doubling_scan, inverse_cdf, sample, tree_sum


def row(position: int = 0, choice: int = 0, banned: tuple[int, ...] = (), **fields: object) -> SamplingRow:
    sampling = Sampling(**{"max_tokens": 8, "seed": 1, **fields})
    return SamplingRow(sampling, choice, [0] * position, 0, banned)


def kept_tokens(logits: torch.Tensor, draws: int = 600, **fields: float) -> set[int]:
    rows = [row(position=i, **fields) for i in range(draws)]
    tokens, sound, _ = sample(logits.repeat(draws, 1), rows)
    assert all(sound)
    return set(tokens)


def test_greedy_takes_the_first_largest_logit() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 1.0, 2.0, 0.0]])
    assert sample(logits, [row(temperature=0.0), row(temperature=1e-6)])[0] == [1, 0]


def test_greedy_and_sampled_rows_share_a_batch_and_do_not_affect_each_other() -> None:
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0))
    rows = [
        row(position=i, seed=i, temperature=[0.0, 0.7, 1.5][i % 3], top_p=[1, 0.8][i % 2]) for i in range(6)
    ]
    together, _, _ = sample(logits.clone(), rows)
    alone = [sample(logits[i : i + 1].clone(), [rows[i]]).tokens[0] for i in range(6)]
    assert together == alone


def test_sampled_frequencies_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5])
    draws = 8000
    tokens, _, _ = sample(logits.repeat(draws, 1), [row(position=i, temperature=0.8) for i in range(draws)])
    counts = torch.bincount(torch.tensor(tokens), minlength=5).double()
    expected = torch.softmax(logits.double() / 0.8, -1) * draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.5  # 0.999 quantile, 4 degrees of freedom


def test_top_k_keeps_the_k_most_likely_tokens() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.5, 0.3])
    assert kept_tokens(logits, top_k=2) == {1, 3}


def test_min_p_keeps_tokens_relative_to_the_most_likely_one() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert kept_tokens(probabilities.log(), min_p=0.31) == {0, 1}


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.25, 0.15])
    assert kept_tokens(probabilities.log(), top_p=0.5) == {1}
    assert kept_tokens(probabilities.log(), top_p=0.51) == {1, 2}
    assert kept_tokens(probabilities.log(), top_p=0.9) == {1, 2, 3}


def test_top_p_counts_within_what_top_k_kept() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # Of the two kept tokens the first has 57% of the mass.
    assert kept_tokens(probabilities.log(), top_k=2, top_p=0.55) == {0}
    assert kept_tokens(probabilities.log(), top_k=2, top_p=0.6) == {0, 1}


def reference_kept(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The kept tokens by full sorting in float64, for distributions without ties."""
    probabilities = torch.softmax(logits.double() / sampling.temperature, -1)
    keep = probabilities >= sampling.min_p * probabilities.max()
    order = probabilities.argsort(descending=True)
    if sampling.top_k:
        keep[order[sampling.top_k :]] = False
    mass = probabilities[keep].sum()
    before = torch.zeros_like(probabilities)
    before[order] = torch.where(keep, probabilities, 0.0)[order].cumsum(-1)
    before -= torch.where(keep, probabilities, 0.0)
    return keep & (before < sampling.top_p * mass)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.3, 1.9),
    st.floats(0.05, 1.0),
    st.sampled_from([0, 1, 5, 700, 1500]),
    st.sampled_from([0.0, 0.001, 0.1]),
)
def test_no_filtered_token_is_ever_drawn(
    seed: int, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3000, generator=generator) * (1 + seed % 4)
    sampling = Sampling(
        max_tokens=8, seed=seed, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p
    )
    # A hair wider than the exact set, for float32's rounding at its edge.
    allowed = reference_kept(
        logits,
        msgspec.structs.replace(sampling, top_p=min(1.0, top_p * (1 + 1e-5)), min_p=min_p * (1 - 1e-5)),
    )
    tokens, _, _ = sample(logits.repeat(40, 1), [SamplingRow(sampling, 0, [0] * i, 0) for i in range(40)])
    assert all(bool(allowed[token]) for token in tokens)


def test_banned_tokens_are_never_chosen() -> None:
    logits = torch.tensor([0.0, 9.0, 8.0, 1.0])
    assert sample(logits[None].clone(), [row(temperature=0.0, banned=(1, 2))])[0] == [3]


def test_a_row_that_is_not_finite_is_reported_and_spares_the_others() -> None:
    logits = torch.zeros(3, 10)
    logits[1, 4] = math.nan
    logits[2, 7] = 5.0
    rows = [row(temperature=0.0), row(temperature=0.9, logprobs=1), row(temperature=0.0, logprobs=1)]
    tokens, sound, logprobs = sample(logits, rows)
    assert sound == [True, False, True]
    assert tokens[2] == 7
    assert [len(reported.ids) for reported in logprobs] == [0, 0, 2]


@pytest.mark.parametrize("vocab_size", [1, 255, 256, 257, 5000])
def test_inverse_cdf_finds_each_token_at_its_share(vocab_size: int) -> None:
    weights = torch.rand(1, vocab_size, generator=torch.Generator().manual_seed(1))
    weights[0, ::3] = 0 if vocab_size > 1 else 1
    ends = weights.double().cumsum(-1)[0]
    for token in (weights[0] > 0).nonzero()[:, 0].tolist()[:: max(1, vocab_size // 40)]:
        middle = (ends[token] - weights[0, token].double() / 2) / ends[-1]
        assert inverse_cdf(weights, middle.float()[None]).tolist() == [token]


@pytest.mark.parametrize("length", [1, 2, 3, 192, 256])
def test_the_scan_for_gpus_is_a_running_sum(length: int) -> None:
    values = torch.rand(3, length, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(doubling_scan(values).double(), values.double().cumsum(-1), atol=1e-4)


def test_the_sum_for_gpus_is_a_sum() -> None:
    values = torch.rand(3, 5, 256, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(tree_sum(values).double(), values.double().sum(-1), atol=1e-4)


def test_inverse_cdf_stays_on_the_last_weighted_token_when_rounding_runs_past_the_end() -> None:
    weights = torch.zeros(1, 600)
    weights[0, 300] = 1e-30
    assert inverse_cdf(weights, torch.tensor([1.0])).tolist() == [300]
