"""Keeping texts in their grammar: what may not come next gets a logit of minus infinity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.structured.constraint import WORD_BITS, Constraint, Masks, masks_of


def constrained(rows: Sequence[SamplingRow]) -> tuple[list[int], list[Constraint]]:
    """Which rows follow a grammar, and where they are in it."""
    found = [(index, row.constraint) for index, row in enumerate(rows) if row.constraint is not None]
    return [index for index, _ in found], [constraint for _, constraint in found]


def constrain(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Change float32 logits `[num_rows, vocab_size]` on a CPU in place."""
    indices, constraints = constrained(rows)
    for index, mask in zip(indices, masks_of(constraints, logits.shape[1]), strict=True):
        logits[index].masked_fill_(_forbidden(mask, logits.shape[1]), -torch.inf)


def _forbidden(mask: Masks, vocab_size: int) -> Tensor:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=vocab_size)
    return torch.from_numpy(bits).view(torch.bool).logical_not_()


def constrain_on_device(logits: Tensor, indices: Tensor, masks: Tensor) -> None:
    """The same without a host sync, for the rows `indices`, int64 `[n]`, of masks int64 `[n, mask_words]`."""
    places = torch.arange(WORD_BITS, device=logits.device)
    bits = (masks[:, :, None] >> places) & 1
    allowed = bits.view(len(masks), -1)[:, : logits.shape[1]].bool()
    kept = torch.where(allowed, logits.index_select(0, indices), -torch.inf)
    logits.index_copy_(0, indices, kept)
