"""What requests change in their logits, as flat arrays: `adjust.adjust` for a batch that is on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfllm_worker.sampling.adjust import SamplingRow, adjusts, completed_bad_words

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Edits(NamedTuple):
    """Changes to single logits of a batch, at most one for each; arrays of equal length but for the last.

    A logit gets `bias`, is then divided by `penalty` if it is positive, else multiplied by it, and loses
    `loss`, which is infinite for a token that must not come. `restricted` are rows in which every token
    that has no edit must not come either.
    """

    rows: Integers
    tokens: Integers
    bias: Floats
    penalty: Floats
    loss: Floats
    restricted: Integers


def edits_of(rows: Sequence[SamplingRow]) -> Edits | None:
    """What the rows change, if anything."""
    changes = [(index, _changes(row)) for index, row in enumerate(rows) if adjusts(row)]
    if not changes:
        return None
    places = [np.full(len(tokens), index) for index, (tokens, _) in changes]
    numbers = np.concatenate([values for _, (_, values) in changes], axis=1)
    restricted = [index for index, _ in changes if rows[index].sampling.allowed_token_ids]
    return Edits(
        np.concatenate(places),
        np.concatenate([tokens for _, (tokens, _) in changes]),
        numbers[0],
        numbers[1],
        numbers[2],
        np.array(restricted, dtype=np.int64),
    )


def _changes(row: SamplingRow) -> tuple[Integers, Floats]:
    """A row's tokens, and float32 `[3, n]`: the bias, penalty and loss of each."""
    sampling = row.sampling
    seen = np.unique(_ids(row.tokens)) if sampling.repetition_penalty != 1 else _ids()
    output, counts = _ids(), _ids()
    if sampling.frequency_penalty or sampling.presence_penalty:
        output, counts = np.unique(_ids(row.tokens[row.prompt_count :]), return_counts=True)
    biased, allowed = _ids([token for token, _ in sampling.logit_bias]), _ids(sampling.allowed_token_ids)
    banned = _ids([*row.banned, *completed_bad_words(row)])
    tokens = np.unique(np.concatenate((seen, output, biased, allowed, banned)))
    bias, penalty, loss = np.zeros((3, len(tokens)), dtype=np.float32)
    penalty += 1
    bias[np.searchsorted(tokens, biased)] = [bias for _, bias in sampling.logit_bias]
    penalty[np.searchsorted(tokens, seen)] = sampling.repetition_penalty
    places = np.searchsorted(tokens, output)
    loss[places] = np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
    loss[places] += np.float32(sampling.presence_penalty)
    if sampling.allowed_token_ids:
        loss[~np.isin(tokens, allowed)] = np.inf
    loss[np.searchsorted(tokens, banned)] = np.inf
    return tokens, np.stack((bias, penalty, loss))


def apply_edits(logits: Tensor, edits: Sequence[Tensor]) -> None:
    """Change logits, float32 `[n, vocab_size]` with rows side by side, in place and without a host sync.

    `edits` are the arrays of `Edits` as int64 tensors on the logits' device, floats by their bits.
    """
    rows, tokens, *numbers, restricted = edits
    bias, penalty, loss = (number.to(torch.int32).view(torch.float32) for number in numbers)
    places = rows * logits.shape[1] + tokens
    flat = logits.view(-1)
    values = flat.index_select(0, places).add_(bias)
    values = torch.where(values > 0, values / penalty, values * penalty)
    # A token that must not come is not even a NaN then, as in `adjust`.
    values = torch.where(torch.isinf(loss), -torch.inf, values - loss)
    if len(restricted):
        logits.index_fill_(0, restricted, -torch.inf)
    flat.index_copy_(0, places, values)


def as_integers(edits: Edits) -> list[Integers]:
    """The arrays as int64, floats by their bits, for `Staging`."""
    numbers = [array.view(np.int32).astype(np.int64) for array in (edits.bias, edits.penalty, edits.loss)]
    return [edits.rows, edits.tokens, *numbers, edits.restricted]


def _ids(tokens: Sequence[int] = ()) -> Integers:
    return np.array(tokens, dtype=np.int64)
