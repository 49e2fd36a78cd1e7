"""Keeping rows in their grammars: what may not come next gets a logit of minus infinity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace
from torch import Tensor

from sfllm_worker.sampling.adjust import SamplingRow, completed_bad_words
from sfllm_worker.structured.constraint import Constraint, Masks, masks_of

BYTE_BITS = 8

RowMasks = Mapping[int, Masks]
"""The mask of each row that follows a grammar, int64 `[mask_words]`, by the row's index."""


def grammar_masks(rows: Sequence[SamplingRow], vocab_size: int) -> RowMasks:
    """Which tokens the rows' grammars allow. Choices that branch off one text have its constraint."""
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


def yielding(rows: Sequence[SamplingRow], masks: RowMasks) -> Sequence[SamplingRow]:
    """The rows without what would leave no token of their masks: a grammar goes before the rest.

    First it is the end of text that may come too early, then all that is not allowed.
    """
    changed = {index: _yield(rows[index], mask) for index, mask in masks.items() if _is_limited(rows[index])}
    return [changed.get(index, row) for index, row in enumerate(rows)] if changed else rows


def _is_limited(row: SamplingRow) -> bool:
    return bool(row.banned or row.sampling.allowed_token_ids or row.sampling.bad_words)


def _yield(row: SamplingRow, mask: Masks) -> SamplingRow:
    sampling = row.sampling
    banned = {*row.banned, *completed_bad_words(row)}
    if not sampling.allowed_token_ids and int.from_bytes(mask.tobytes(), "little").bit_count() > len(banned):
        return row
    left = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    if sampling.allowed_token_ids:
        left = np.intersect1d(left, sampling.allowed_token_ids)
    if np.isin(left, list(banned), invert=True).any():
        return row
    if np.isin(left, completed_bad_words(row), invert=True).any():
        return row._replace(banned=())
    return row._replace(banned=(), sampling=replace(sampling, allowed_token_ids=(), bad_words=()))


def as_arrays(masks: RowMasks) -> list[npt.NDArray[np.int64]]:
    """The rows' indices `[n]`, and their masks `[n, mask_words]`."""
    return [np.array(list(masks), dtype=np.int64), np.stack(list(masks.values()))]


def constrain(logits: Tensor, indices: Tensor, masks: Tensor) -> None:
    """Change float32 logits `[num_rows, vocab_size]` in place, by `as_arrays` on their device. No host sync.

    In bytes, for a wider type would be eight times as much to write as a whole batch's mask.
    """
    shifts = torch.arange(BYTE_BITS, dtype=torch.uint8, device=logits.device)
    bits = (masks.view(torch.uint8)[:, :, None] >> shifts) & 1
    forbidden = bits.view(len(masks), -1)[:, : logits.shape[1]] == 0
    logits.index_copy_(0, indices, logits.index_select(0, indices).masked_fill_(forbidden, -torch.inf))
