"""Which tokens a real model might have said, given what float32 can tell apart."""

from __future__ import annotations

import pytest
import torch
from chaos.ask import Delivered, Delivery
from chaos.judge import Difference
from chaos.recompute import Recomputed, might_be_chosen
from chaos.templates import Template

from sfllm.messages import Sampling
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.sampler import sample

PROMPT = [5, 6, 7]


def row(temperature: float, seed: int = 3, top_p: float = 1.0) -> SamplingRow:
    return SamplingRow(Sampling(max_tokens=9, seed=seed, temperature=temperature, top_p=top_p), 0, PROMPT, 3)


def test_of_two_greedy_tokens_only_a_near_tie_may_take_the_others_place() -> None:
    logits = torch.tensor([0.0, 3.0, 3.0 - 5e-5, 2.999])
    assert [might_be_chosen(logits, row(0.0), token) for token in range(4)] == [False, True, True, False]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_of_sampled_tokens_only_neighbours_of_the_random_number_are_possible(top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(64)
    for seed in range(50):
        [token] = sample(logits[None].clone(), [row(1.0, seed, top_p)]).tokens
        possible = [other for other in range(64) if might_be_chosen(logits, row(1.0, seed, top_p), other)]
        assert token in possible
        assert len(possible) <= 3


def test_a_delivery_is_excused_when_every_token_from_the_difference_on_is_the_models() -> None:
    model = Recomputed("tiny-llama", "dummy")
    body = {"max_tokens": 6, "seed": 3, "temperature": 0.0}
    ids: list[int] = []
    for _ in range(6):
        ids.append(int(model.logits([*PROMPT, *ids])[-1].argmax()))

    def delivery(tokens: list[int]) -> Delivery:
        return Delivery(Template("greedy", "", body), {0: Delivered(tokens)}, prompt_ids=PROMPT)

    assert model.excuses(Difference(0, 2, ids[2], ids[2]), delivery(ids))
    another = (ids[2] + 1) % 200
    assert not model.excuses(Difference(0, 2, ids[2], another), delivery([*ids[:2], another, *ids[3:]]))
    later = [*ids[:4], (ids[4] + 1) % 200, ids[5]]
    assert not model.excuses(Difference(0, 2, ids[2], ids[2]), delivery(later))
