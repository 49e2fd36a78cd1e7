import math

import pytest
import torch

from sfllm.messages import Sampling
from sfllm_worker.sampling.adjust import SamplingRow, adjust, adjusts
from sfllm_worker.sampling.sampler import sample


def row(tokens: list[int], prompt_count: int, **fields: object) -> SamplingRow:
    return SamplingRow(Sampling(**{"max_tokens": 8, "seed": 1, **fields}), 0, tokens, prompt_count)


def adjusted(logits: list[float], r: SamplingRow) -> list[float]:
    assert adjusts(r)
    tensor = torch.tensor(logits)
    adjust(tensor, r)
    return tensor.tolist()


def test_a_row_without_wishes_is_left_alone() -> None:
    assert not adjusts(row([1, 2], 1, temperature=0.3, top_p=0.5, top_k=3, stop_token_ids=(1,)))


def test_frequency_and_presence_penalties_count_output_tokens_only() -> None:
    r = row([0, 0, 1, 1, 2], 3, frequency_penalty=0.5, presence_penalty=0.25)
    assert adjusted([1.0, 1.0, 1.0, 1.0], r) == [1.0, 1.0 - 0.5 - 0.25, 1.0 - 0.5 - 0.25, 1.0]
    twice = row([0, 1, 1], 1, frequency_penalty=0.5, presence_penalty=0.25)
    assert adjusted([1.0, 1.0], twice) == [1.0, 1.0 - 2 * 0.5 - 0.25]


def test_the_repetition_penalty_weakens_seen_tokens_whatever_their_sign() -> None:
    r = row([0, 1], 1, repetition_penalty=2.0)
    assert adjusted([4.0, -4.0, 4.0], r) == [2.0, -8.0, 4.0]


def test_a_bias_is_added() -> None:
    assert adjusted([0.0, 1.0, 2.0], row([0], 1, logit_bias=((0, 5.0), (2, -100.0)))) == [5.0, 1.0, -98.0]


def test_only_allowed_tokens_remain() -> None:
    assert adjusted([0.0, 1.0, 2.0], row([0], 1, allowed_token_ids=(0, 1))) == [0.0, 1.0, -math.inf]


@pytest.mark.parametrize(
    ("output", "banned"),
    [([], {3}), ([1], {2, 3}), ([1, 4], {3}), ([4, 1], {2, 3}), ([1, 2], {3})],
)
def test_a_bad_word_is_never_completed_but_may_begin(output: list[int], banned: set[int]) -> None:
    r = row([1, 2, *output], 2, bad_words=((3,), (1, 2)))
    result = adjusted([0.0] * 6, r)
    assert {token for token, value in enumerate(result) if value == -math.inf} == banned


def test_reported_log_probabilities_are_the_models_own() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 2)
    original = logits[0].log_softmax(-1)
    rows = [
        row([0], 1, temperature=0.0, logit_bias=((1, 50.0),), logprobs=2),
        row([0], 1, temperature=0.0),
    ]
    sampled = sample(logits, rows)
    assert sampled.tokens == [1, 3]
    width, ids, values = sampled.logprobs[0]
    assert (width, ids) == (3, [1, 3, 2])
    assert values == pytest.approx(original[[1, 3, 2]].tolist())
    assert sampled.logprobs[1].width == 0
