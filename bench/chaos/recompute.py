"""Whether a token that differs from the calm run's is a near-tie of the real model.

A stream that moved is computed in other batches and pieces than before, and float32 sums in another order
differ in their last digits. Where two tokens are as likely as each other to that precision, either is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chaos.ask import Delivery
from chaos.judge import Difference
from sfllm.messages import Sampling
from sfllm.model_files import resolve_model
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load import load_model
from sfllm_worker.model.attention_batch import AttentionBatch
from sfllm_worker.sampling.adjust import SamplingRow, adjust
from sfllm_worker.sampling.philox import Purpose, uniforms
from sfllm_worker.sampling.sampler import sample

TOLERANCE = 1e-4
"""Of logits, and of the running sum of probabilities that a random number is compared with."""

BLOCK_TOKENS = 32


class Recomputed:
    """The model in this process."""

    def __init__(self, path: str, load_format: str) -> None:
        found = path if load_format == "dummy" else resolve_model(path)
        self._decoder = load_model(found, dtype="float32", load_format=load_format).decoder

    def excuses(self, difference: Difference, delivery: Delivery) -> bool:
        """Whether the model might have said either token there, and every later one that was delivered."""
        sampling = sampling_of(delivery.template.body)
        ids = delivery.choices[difference.choice].ids
        prompt = delivery.prompt_ids
        logits = self.logits([*prompt, *ids[:-1]])[len(prompt) - 1 :]
        choice = difference.choice

        def possible(position: int, token: int) -> bool:
            row = SamplingRow(sampling, choice, [*prompt, *ids[:position]], len(prompt))
            return might_be_chosen(logits[position], row, token)

        return possible(difference.position, difference.expected) and all(
            possible(position, ids[position]) for position in range(difference.position, len(ids))
        )

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits float32 `[len(tokens), vocab]`, computed at once."""
        blocks = -(-len(tokens) // BLOCK_TOKENS)
        decoder = self._decoder
        cache = KVCache(decoder.config, blocks + 1, BLOCK_TOKENS, decoder.dtype, decoder.device)
        table = list(range(1, blocks + 1))
        batch = AttentionBatch.build([len(tokens)], [len(tokens)], [table], BLOCK_TOKENS, decoder.device)
        hidden = decoder.forward(torch.tensor(list(tokens)), batch.positions, batch, cache)
        return decoder.logits(hidden).float()


def sampling_of(body: Mapping[str, Any]) -> Sampling:
    """How a request of `templates.py` samples."""
    names = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    given = {name: float(body[name]) for name in names if name in body}
    return Sampling(max_tokens=body["max_tokens"], seed=body["seed"], **given)  # type: ignore[arg-type] # floats


def might_be_chosen(logits: Tensor, row: SamplingRow, token: int) -> bool:
    """Whether logits that differ by the tolerance may give `token`."""
    sampling = row.sampling
    if sample(logits[None].clone(), [row]).tokens == [token]:
        return True
    adjusted = logits.clone()
    adjust(adjusted, row)
    if sampling.temperature == 0:
        return bool(adjusted.max() - adjusted[token] <= TOLERANCE)
    probabilities = torch.softmax(adjusted.double() / sampling.temperature, dim=-1)
    uniform = float(uniforms([sampling.seed], [row.choice], [row.position], Purpose.SAMPLE)[0])
    bounds = (
        [sampling.top_p + shift for shift in (-TOLERANCE, 0.0, TOLERANCE)] if sampling.top_p < 1 else [1.0]
    )
    return any(_is_near(probabilities, bound, uniform, token) for bound in bounds)


def _is_near(probabilities: Tensor, top_p: float, uniform: float, token: int) -> bool:
    """Whether a number close to `uniform` would choose `token` among the likeliest that make up `top_p`."""
    if top_p < 1:
        values = probabilities.sort(descending=True).values
        last = int((values.cumsum(dim=-1) < top_p).sum())
        probabilities = torch.where(probabilities >= values[last], probabilities, 0.0)
    ends = probabilities.cumsum(dim=-1)
    target = uniform * float(ends[-1])
    end = float(ends[token])
    weight = float(probabilities[token])
    return weight > 0 and end - weight - TOLERANCE <= target <= end + TOLERANCE
