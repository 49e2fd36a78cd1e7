"""Embeddings: from the final hidden rows of a prompt to one row.

The mean over all tokens (Reimers and Gurevych, Sentence-BERT, 2019), or the row of the last token, which
alone has seen all others in a causal model (Neelakantan et al., "Text and Code Embeddings by Contrastive
Pre-Training", 2022).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from sfllm_worker.engine.planner import StepPlan
from sfllm_worker.engine.sequence import Sequence


class PooledRow(NamedTuple):
    """Tokens `first .. end` of a step are `sequence`'s, its last ones if it `completes`."""

    sequence: Sequence
    first: int
    end: int
    completes: bool


def pooled_rows(plan: StepPlan) -> list[PooledRow]:
    """The rows of a planned step that belong to prompts whose embedding is wanted."""
    rows = []
    end = 0
    for sequence, num_tokens, _, completes in plan.rows:
        end += num_tokens
        if sequence.sampling.pooling:
            rows.append(PooledRow(sequence, end - num_tokens, end, completes))
    return rows


class Pooler:
    """Owner of the sums of prompts that take several steps; they are forgotten with their sequence."""

    def __init__(self) -> None:
        self._sums: WeakKeyDictionary[Sequence, Tensor] = WeakKeyDictionary()

    def take(self, rows: Seq[PooledRow], hidden: Tensor) -> dict[Sequence, Tensor]:
        """Embeddings, float32 [hidden_size], of prompts that `hidden` [num_tokens, hidden_size] completes.

        Called before the step counts as launched, so that a prompt that was preempted begins anew.
        """
        found = {}
        for sequence, first, end, completes in rows:
            if sequence.sampling.pooling == "last":
                if completes:
                    found[sequence] = hidden[end - 1].float()
                continue
            total = hidden[first:end].float().sum(dim=0)
            if sequence.computed:
                total += self._sums[sequence]
            if completes:
                self._sums.pop(sequence, None)
                found[sequence] = total / sequence.prompt_count
            else:
                self._sums[sequence] = total
        return found
