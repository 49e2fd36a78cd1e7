"""Keeping rows in their grammars: what may not come next gets a logit of minus infinity."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace
from torch import Tensor

from sfllm_worker.sampling.adjust import SamplingRow, completed_bad_words
from sfllm_worker.structured.constraint import WORD_BITS, Constraint, Masks, masks_of

BYTE_BITS = 8

RowMasks = Mapping[int, Masks]
"""The mask of each row that follows a grammar, int64 `[mask_words]`, by the row's index."""


def follow_grammars(
    rows: Sequence[SamplingRow], vocab_size: int
) -> tuple[Sequence[SamplingRow], dict[int, Masks]]:
    """The masks of rows with a constraint, and the rows without what their masks say already.

    A mask leaves out what else must not come. Where that would leave nothing, it is the end of text before
    `min_tokens` that may come after all, and if there is still nothing, whatever the grammar allows.
    """
    masks = _masks(rows, vocab_size)
    if not masks:
        return rows, masks
    narrowed = list(rows)
    for index, mask in masks.items():
        if _is_limited(rows[index]):
            narrowed[index], masks[index] = _narrow(rows[index], mask)
    return narrowed, masks


def _masks(rows: Sequence[SamplingRow], vocab_size: int) -> dict[int, Masks]:
    """What the grammars allow. Choices that branch off one text have its constraint."""
    constraints: dict[int, Constraint] = {}
    places: dict[Constraint, int] = {}
    for index, row in enumerate(rows):
        if row.constraint is not None:
            constraints[index] = row.constraint
            places.setdefault(row.constraint, len(places))
    if not constraints:
        return {}
    masks = masks_of(list(places), vocab_size)
    return {index: masks[places[constraint]] for index, constraint in constraints.items()}


def _is_limited(row: SamplingRow) -> bool:
    return bool(row.banned or row.sampling.allowed_token_ids or row.sampling.bad_words)


def _narrow(row: SamplingRow, mask: Masks) -> tuple[SamplingRow, Masks]:
    sampling = row.sampling
    allowed = mask
    if sampling.allowed_token_ids:
        allowed = mask & _bits(sampling.allowed_token_ids, len(mask))
    if sampling.bad_words:
        allowed = allowed & ~_bits(completed_bad_words(row), len(mask))
    long_enough = allowed & ~_bits(row.banned, len(mask))
    found = next((each for each in (long_enough, allowed) if each.any()), mask)
    if sampling.allowed_token_ids or sampling.bad_words:
        sampling = replace(sampling, allowed_token_ids=(), bad_words=())
    return row._replace(sampling=sampling, banned=()), found


def _bits(tokens: Collection[int], words: int) -> Masks:
    ids = np.array(tuple(tokens), dtype=np.int64)
    bits = np.zeros(words, dtype=np.int64)
    np.bitwise_or.at(bits, ids // WORD_BITS, np.int64(1) << ids % WORD_BITS)
    return bits


def as_arrays(masks: RowMasks) -> list[npt.NDArray[np.int64]]:
    """The rows' indices `[n]`, and their masks `[n, mask_words]`."""
    return [np.array(list(masks), dtype=np.int64), np.stack(list(masks.values()))]


def constrain(logits: Tensor, indices: Tensor, masks: Tensor) -> None:
    """Change float32 logits `[num_rows, vocab_size]` in place, by `as_arrays` on their device. No host sync.

    Bit by bit in bytes: wider types would write eight times as much.
    """
    shifts = torch.arange(BYTE_BITS, dtype=torch.uint8, device=logits.device)
    bits = (masks.view(torch.uint8)[:, :, None] >> shifts) & 1
    forbidden = bits.view(len(masks), -1)[:, : logits.shape[1]] == 0
    logits.index_copy_(0, indices, logits.index_select(0, indices).masked_fill_(forbidden, -torch.inf))
