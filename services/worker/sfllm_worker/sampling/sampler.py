"""From logits to tokens.

Each request's own changes come first (`adjust.py`). Greedy rows take the first largest logit
and need no softmax. The others go through temperature, min-p, top-k and top-p, in this order,
and then take the token at which the cumulative distribution passes one keyed uniform number.
All of it is float32, in token-id order, summed in a fixed order of blocks, so that a row's
result depends neither on its neighbours nor on the device's reduction order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfllm.messages import Sampling
from sfllm.token_batch import NO_LOGPROBS, Logprobs
from sfllm_worker.sampling.adjust import SamplingRow, adjust, adjusts
from sfllm_worker.sampling.constrain import as_arrays, constrain, follow_grammars
from sfllm_worker.sampling.logprobs import token_logprobs
from sfllm_worker.sampling.native import GREEDY_BELOW_TEMPERATURE, can_choose_natively, choose_natively
from sfllm_worker.sampling.philox import Purpose, uniforms

SCAN_BLOCK_TOKENS = 256
TOP_CANDIDATES = 1024
"""Sorting the whole vocabulary is slow; almost always the kept tokens are among so many."""


class Sampled(NamedTuple):
    """Per row: the token, whether the row was sound, and the log probabilities that were asked for.

    A row with a NaN, or whose every token is banned, is not sound: its token means nothing, and it has no
    log probabilities.
    """

    tokens: list[int]
    sound: list[bool]
    logprobs: list[Logprobs]


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
    """Choose a token for each row of `logits` (float32 [num_rows, vocab_size], changed in place)."""
    rows, masks = follow_grammars(rows, logits.shape[1])
    reported = [index for index, row in enumerate(rows) if row.sampling.logprobs >= 0]
    original = logits[reported] if reported else None
    for index, row in enumerate(rows):
        if adjusts(row):
            adjust(logits[index], row)
    if can_choose_natively(logits):
        chosen_tokens, sound = choose_natively(logits, rows, masks)
    else:
        if masks:
            constrain(logits, *map(torch.from_numpy, as_arrays(masks)))
        chosen_tokens, sound = choose_in_torch(logits, rows)
    logprobs = [NO_LOGPROBS] * len(rows)
    if original is not None:
        for place, index in enumerate(reported):
            if sound[index]:
                top = rows[index].sampling.logprobs
                logprobs[index] = token_logprobs(original[place : place + 1], [chosen_tokens[index]], top)
    return Sampled(chosen_tokens, sound, logprobs)


def choose_in_torch(logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[bool]]:
    """A token for each row of adjusted logits, and whether the row was sound. On any device."""
    best, tokens = logits.max(dim=-1)
    sound = torch.isfinite(best)
    random_rows = [
        index for index, row in enumerate(rows) if row.sampling.temperature >= GREEDY_BELOW_TEMPERATURE
    ]
    if random_rows:
        chosen = [rows[index] for index in random_rows]
        subset = logits if len(random_rows) == len(rows) else logits[random_rows]
        tokens[random_rows] = _sample_random(subset, chosen)
    return tokens.tolist(), sound.tolist()


def _sample_random(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    device = logits.device
    settings = [row.sampling for row in rows]
    temperature = torch.tensor([s.temperature for s in settings], dtype=torch.float32, device=device)
    probabilities = torch.softmax(logits / temperature[:, None], dim=-1)
    if any(s.top_k > 0 or s.top_p < 1 or s.min_p > 0 for s in settings):
        probabilities = torch.where(
            probabilities >= _thresholds(probabilities, settings)[:, None], probabilities, 0.0
        )
    uniform = uniforms(
        [s.seed for s in settings],
        [row.choice for row in rows],
        [row.position for row in rows],
        Purpose.SAMPLE,
    )
    return inverse_cdf(probabilities, torch.from_numpy(uniform).to(device))


def _thresholds(probabilities: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """The smallest probability [num_rows] that min-p, top-k and top-p together keep.

    Tokens that tie with the last kept one are kept too.
    """
    device, vocab_size = probabilities.device, probabilities.shape[-1]
    bounds = _Bounds(
        min_p=torch.tensor([s.min_p for s in settings], dtype=torch.float32, device=device),
        top_k=torch.tensor([s.top_k or vocab_size for s in settings], device=device).clamp(max=vocab_size),
        top_p=torch.tensor([s.top_p for s in settings], dtype=torch.float64, device=device),
        vocab_size=vocab_size,
    )
    values = torch.topk(probabilities, min(TOP_CANDIDATES, vocab_size), dim=-1).values
    threshold, decided = _threshold_among(values, bounds)
    if not bool(decided.all()):
        values = torch.sort(probabilities, dim=-1, descending=True).values
        exact, _ = _threshold_among(values, bounds)
        threshold = torch.where(decided, threshold, exact)
    return threshold


class _Bounds(NamedTuple):
    """The filters of each row, as tensors [num_rows]; `top_k` is at most the vocabulary."""

    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    vocab_size: int


def _threshold_among(values: Tensor, bounds: _Bounds) -> tuple[Tensor, Tensor]:
    """Thresholds from the largest probabilities `values` [num_rows, width], in descending order.

    The second result says for which rows these values were enough to decide.
    """
    width = values.shape[-1]
    rank = torch.arange(width, device=values.device)
    kept = (values >= bounds.min_p[:, None] * values[:, :1]) & (rank[None] < bounds.top_k[:, None])
    count = kept.sum(dim=-1)
    all_kept_seen = (count < width) | (bounds.top_k <= width)
    everything_passes = (bounds.min_p == 0) & (bounds.top_k == bounds.vocab_size)
    cumulative = torch.where(kept, values, 0.0).double().cumsum(dim=-1)
    # Top-p counts within what min-p and top-k kept. Where everything passes, that mass is 1.
    mass = torch.where(all_kept_seen, cumulative[:, -1], 1.0)
    reached = cumulative >= (bounds.top_p * mass)[:, None]
    found = reached.any(dim=-1) & (bounds.top_p < 1)
    last = torch.where(found, torch.minimum(reached.int().argmax(dim=-1), count - 1), count - 1)
    unfiltered = everything_passes & (bounds.top_p >= 1)
    threshold = torch.where(unfiltered, 0.0, values.gather(-1, last[:, None])[:, 0])
    return threshold, all_kept_seen | (found & everything_passes) | unfiltered


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the running sum of `weights` passes `uniform` times their sum.

    `weights` float32 [num_rows, vocab_size], not negative and not all zero; `uniform` float32
    [num_rows] in [0, 1). When rounding runs past the end, the last token with weight. Int64 [num_rows].
    """
    num_rows, vocab_size = weights.shape
    num_blocks = -(-vocab_size // SCAN_BLOCK_TOKENS)
    padding = num_blocks * SCAN_BLOCK_TOKENS - vocab_size
    blocks = torch.nn.functional.pad(weights, (0, padding)).view(num_rows, num_blocks, SCAN_BLOCK_TOKENS)
    block_ends = _scan(_block_sums(blocks))
    target = uniform * block_ends[:, -1]
    block = _first_above(block_ends, target)
    before = torch.where(block > 0, block_ends.gather(-1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside = _scan(blocks[torch.arange(num_rows, device=weights.device), block])
    return block * SCAN_BLOCK_TOKENS + _first_above(inside, target - before)


def _first_above(ends: Tensor, target: Tensor) -> Tensor:
    """Index of the first running sum in `ends` above `target`, which is an entry with weight.

    A target that rounding moved to the last sum or beyond is taken just below it.
    """
    last = ends[:, -1]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    return (ends <= target[:, None]).sum(dim=-1)


def _block_sums(blocks: Tensor) -> Tensor:
    """Sum over the last dimension in an order that depends on nothing but its length."""
    return blocks.sum(dim=-1) if blocks.device.type == "cpu" else tree_sum(blocks)


def tree_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension (a power of two) by halving: elementwise and so deterministic."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def _scan(values: Tensor) -> Tensor:
    """Running sum over the last dimension in a fixed order.

    `torch.cumsum` adds one after another on a CPU, but is documented as nondeterministic on CUDA.
    """
    return values.cumsum(dim=-1) if values.device.type == "cpu" else doubling_scan(values)


def doubling_scan(values: Tensor) -> Tensor:
    """Running sum by doubling distances (Hillis and Steele, 1986): elementwise and so deterministic."""
    shift = 1
    while shift < values.shape[-1]:
        values = torch.cat((values[..., :shift], values[..., shift:] + values[..., :-shift]), dim=-1)
        shift *= 2
    return values
