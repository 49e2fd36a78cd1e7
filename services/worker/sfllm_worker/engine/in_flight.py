"""Steps that were launched and not read, and how the next step gets the tokens that they choose."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfllm_worker.engine.interface import PromptReport
from sfllm_worker.engine.pending import PendingSample
from sfllm_worker.engine.planned import PromptSpan
from sfllm_worker.engine.planner import StepPlan
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.graphs.runner import StepInputs
from sfllm_worker.graphs.staging import Staging
from sfllm_worker.model.attention import AttentionBatch


class StepInFlight(NamedTuple):
    """A step from its launch until it is read.

    `first_rows` says which of the sampled rows is each completed sequence's first. If it was to fork it
    has one for each of its `branches`, which are choices; else it has one. Completed prompts whose
    embedding is wanted have none.
    """

    plan: StepPlan
    num_tokens: int
    first_rows: dict[Sequence, int]
    branches: dict[Sequence, tuple[int, ...]]
    sample: PendingSample
    num_sampled: int
    reports: list[PromptReport]
    embeddings: dict[Sequence, Tensor]

    def row_of(self, sequence: Sequence, choice: int) -> int:
        """The sampled row with the next token of a completed sequence, as it is for that choice."""
        first = self.first_rows[sequence]
        return first + self.branches[sequence].index(choice) if sequence in self.branches else first


def lay_out(
    plan: StepPlan, token_ids: Tensor, wanted: list[int], spans: list[PromptSpan], block_size: int
) -> StepInputs:
    """The inputs of a planned step, whose logits are those after the tokens `wanted`, then the spans'."""
    rows = plan.rows
    query_lens = [row.num_tokens for row in rows]
    batch = AttentionBatch.build(
        query_lens=query_lens,
        context_lens=[row.start + row.num_tokens for row in rows],
        block_tables=[row.sequence.block_table for row in rows],
        block_size=block_size,
    )
    if spans:
        ends = accumulate(query_lens)
        first_token = {
            row.sequence: end - row.num_tokens - row.start for row, end in zip(rows, ends, strict=True)
        }
        for sequence, start, count in spans:
            first = first_token[sequence] + start - 1
            wanted += range(first, first + count)
    return StepInputs(token_ids, batch, wanted)


def token_ids_of(plan: StepPlan, before: StepInFlight | None, staging: Staging) -> Tensor:
    """The tokens of a planned step, int64 in the order of its rows: on the host if all are known there.

    Tokens that nobody has read yet are those that the step `before` it chooses: the device takes them
    from there.
    """
    ids: list[int] = []
    for sequence, num_tokens, start, _ in plan.rows:
        ids += sequence.tokens[start : start + num_tokens]
    if before is None or len(ids) == sum(row.num_tokens for row in plan.rows):
        return torch.from_numpy(np.array(ids, dtype=np.int64))
    return _fed_token_ids(plan, before, staging)


def _fed_token_ids(plan: StepPlan, before: StepInFlight, staging: Staging) -> Tensor:
    ids: list[int] = []
    places: list[int] = []
    sources: list[int] = []
    for sequence, num_tokens, start, _ in plan.rows:
        if start < len(sequence.tokens):
            ids += sequence.tokens[start : start + num_tokens]
        else:
            places.append(len(ids))
            sources.append(before.row_of(sequence, sequence.choice))
            ids.append(0)
    chosen = before.sample.tokens
    if len(ids) == before.num_sampled and sources == list(range(len(ids))):
        return chosen  # as long as nobody comes or goes
    known, at, source = staging.to_device([np.array(column) for column in (ids, places, sources)])
    return known.index_copy(0, at, chosen.index_select(0, source))
