"""The sampler of the GPU, its kernels in Triton's interpreter: the same result as the sampler of the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfllm.messages import Sampling
from sfllm_worker.sampling.adjust import SamplingRow, adjust, adjusts
from sfllm_worker.sampling.device import DeviceSampler
from sfllm_worker.sampling.edits import apply_edits, as_integers, edits_of
from sfllm_worker.sampling.parameters import ParameterTable
from sfllm_worker.sampling.sampler import sample

CPU = torch.device("cpu")
VOCAB = 12
TOKENS = st.integers(0, VOCAB - 1)


def row(
    tokens: list[int], prompt_count: int = 0, banned: tuple[int, ...] = (), **fields: object
) -> SamplingRow:
    values: dict[str, object] = {"max_tokens": 8, "seed": 1, **fields}
    return SamplingRow(Sampling(**values), 0, tokens, prompt_count, banned)  # type: ignore[arg-type]


@st.composite
def adjusted_rows(draw: st.DrawFn) -> SamplingRow:
    tokens = draw(st.lists(TOKENS, min_size=1, max_size=8))
    some = st.lists(TOKENS, max_size=3, unique=True).map(tuple)
    biases = st.dictionaries(TOKENS, st.floats(-5, 5, width=32), max_size=3)
    words = st.lists(st.lists(TOKENS, min_size=1, max_size=2).map(tuple), max_size=2).map(tuple)
    return row(
        tokens,
        draw(st.integers(0, len(tokens))),
        draw(some),
        frequency_penalty=draw(st.sampled_from([0.0, 0.7, -0.3])),
        presence_penalty=draw(st.sampled_from([0.0, 1.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.9])),
        logit_bias=tuple(draw(biases).items()),
        allowed_token_ids=draw(some),
        bad_words=draw(words),
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(adjusted_rows(), min_size=1, max_size=4), st.integers(0, 2**31))
def test_logits_are_changed_exactly_as_on_a_cpu(rows: list[SamplingRow], seed: int) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    logits[0, seed % VOCAB] = [math.nan, -math.inf, 0.0][seed % 3]
    expected, ours = logits.clone(), logits.clone()
    for index, one in enumerate(rows):
        if adjusts(one):
            adjust(expected[index], one)
    edits = edits_of(rows)
    assert (edits is None) == (not any(map(adjusts, rows)))
    if edits is not None:
        apply_edits(ours, [torch.from_numpy(array) for array in as_integers(edits)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def test_a_batch_of_all_kinds_gives_what_the_sampler_of_the_cpu_gives() -> None:
    rows = [
        row([1], temperature=0.0, logprobs=0),
        row([2, 3, 3], 1, temperature=0.0, banned=(4,), frequency_penalty=1.5),
        row([2], seed=9, top_p=0.8, logprobs=3),
        row([5, 5], 1, top_k=4, allowed_token_ids=(1, 5, 7), logprobs=40),
        row([6], temperature=0.7, logprobs=2),
    ]
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    logits[4, 0] = math.nan
    pending = DeviceSampler(CPU).launch(logits.clone(), rows)
    tokens, sound, logprobs = pending.read()
    expected = sample(logits.clone(), rows)
    assert sound == expected.sound == [True, True, True, True, False]
    assert tokens[:4] == expected.tokens[:4]
    assert pending.tokens.tolist() == tokens
    assert pending.tokens.dtype == torch.int64
    for ours, theirs in zip(logprobs, expected.logprobs, strict=True):
        assert (ours.width, ours.ids) == (theirs.width, theirs.ids)
        assert ours.values == pytest.approx(theirs.values)


def test_greedy_rows_take_no_softmax_and_no_parameters() -> None:
    sampler = DeviceSampler(CPU)
    logits = torch.tensor([[0.0, 3.0, 3.0], [2.0, 1.0, math.inf]])
    tokens, sound, logprobs = sampler.launch(logits, [row([0], temperature=0.0)] * 2).read()
    assert (tokens[0], sound) == (1, [True, False])
    assert [entry.width for entry in logprobs] == [0, 0]


def test_no_rows_give_nothing() -> None:
    pending = DeviceSampler(CPU).launch(torch.empty(0, 5), [])
    assert pending.tokens.tolist() == []
    assert pending.read() == ([], [], [])


def test_parameters_follow_their_rows_when_others_come_and_go() -> None:
    table = ParameterTable()
    first, second, third = (row([0] * n, seed=n, temperature=0.5 + n) for n in range(3))
    later = first._replace(tokens=[0] * 7, choice=2)
    for rows in ([first, second], [later, third], [third], [later, second, first, third] * 3):
        assert table.fill(rows).tolist() == ParameterTable().fill(rows).tolist()


def test_tokens_that_nobody_has_read_count_for_the_position() -> None:
    read, unread = row([4, 4, 4]), row([4])._replace(unread=2)
    assert ParameterTable().fill([read]).tolist() == ParameterTable().fill([unread]).tolist()
