"""What a step of several sequences looks like to attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfllm_worker.kv.cache import PADDING_BLOCK


@dataclass(frozen=True)
class AttentionBatch:
    """The sequences of one step: `num_decodes` rows of one token each, then prefill chunks.

    A sequence's `query_len` tokens are its newest; `context_len` counts all its tokens in the cache,
    this step's included. Token rows of the step are the sequences' tokens in order. The python integers
    are for decisions on the host, the tensors live on the device of the model.
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_decodes: int
    num_tokens: int
    block_size: int
    block_tables: Tensor
    """int64 `[num_sequences, max_blocks]`, padded with the padding block."""
    context_lens_tensor: Tensor
    """int64 `[num_sequences]`."""
    slot_mapping: Tensor
    """int64 `[num_tokens]`: where each token's key and value go, `block * block_size + offset`."""
    positions: Tensor
    """int64 `[num_tokens]`: each token's position in its sequence."""
    last_rows: Tensor
    """int64 `[num_sequences]`: the token row of each sequence's newest token."""

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionBatch:
        """Lay out a step; one entry per sequence, decodes first.

        A sequence with one token that stands after a longer chunk is computed as a chunk: correct, but
        without the batching of the decodes. Raises `ValueError` when the lengths contradict each other
        or a table is too short for its context.
        """
        blocks = [-(-context // block_size) for context in context_lens]
        _check(query_lens, context_lens, block_tables, blocks)
        num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
        # Padding on the host as one flat list costs less than a small tensor per sequence.
        width = max(blocks)
        padded = [
            [*table[:count], *([PADDING_BLOCK] * (width - count))]
            for table, count in zip(block_tables, blocks, strict=True)
        ]
        tables = torch.tensor(padded, dtype=torch.int64)
        queries = torch.tensor(list(query_lens), dtype=torch.int64)
        contexts = torch.tensor(list(context_lens), dtype=torch.int64)
        ends = queries.cumsum(0)
        num_tokens = sum(query_lens)
        rows = torch.repeat_interleave(torch.arange(len(query_lens)), queries, output_size=num_tokens)
        positions = torch.arange(num_tokens) + (contexts - ends)[rows]
        slots = tables[rows, positions // block_size] * block_size + positions % block_size
        return cls(
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            num_decodes=num_decodes,
            num_tokens=num_tokens,
            block_size=block_size,
            block_tables=tables.to(device),
            context_lens_tensor=contexts.to(device),
            slot_mapping=slots.to(device),
            positions=positions.to(device),
            last_rows=(ends - 1).to(device),
        )


def _check(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    blocks: Sequence[int],
) -> None:
    if not query_lens or not len(query_lens) == len(context_lens) == len(block_tables):
        raise ValueError("a step needs a query length, a context length and a block table per sequence")
    for i, (query, context, table) in enumerate(zip(query_lens, context_lens, block_tables, strict=True)):
        if not 1 <= query <= context:
            raise ValueError(f"sequence {i}: query length {query} does not fit context length {context}")
        if len(table) < blocks[i]:
            raise ValueError(f"sequence {i}: {len(table)} blocks cannot hold {context} tokens")
