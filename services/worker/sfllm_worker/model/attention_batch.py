"""What a step of several sequences looks like to attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
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
        count, width = len(blocks), max(blocks)
        num_decodes = next((i for i, query in enumerate(query_lens) if query != 1), count)
        positions = [context - 1 for context in context_lens[:num_decodes]]
        slots = [
            table[position // block_size] * block_size + position % block_size
            for table, position in zip(block_tables, positions, strict=False)
        ]
        for i in range(num_decodes, count):
            start, end = context_lens[i] - query_lens[i], context_lens[i]
            positions += range(start, end)
            slots += _slots(block_tables[i], start, end, block_size)
        last_rows = [end - 1 for end in accumulate(query_lens)]
        tables = _padded(block_tables, blocks, width)
        # In one array: a step has just read all weights, so the code and data of each operation, however
        # small, come from memory again.
        parts = (context_lens, last_rows, positions, slots, tables)
        packed = torch.from_numpy(np.array([*chain.from_iterable(parts)], dtype=np.int64))
        context_lens_tensor, last_rows_tensor, positions_tensor, slot_mapping, block_tables_tensor = (
            part.to(device) for part in packed.split_with_sizes([len(part) for part in parts])
        )
        return cls(
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            num_decodes=num_decodes,
            num_tokens=len(positions),
            block_size=block_size,
            block_tables=block_tables_tensor.view(count, width),
            context_lens_tensor=context_lens_tensor,
            slot_mapping=slot_mapping,
            positions=positions_tensor,
            last_rows=last_rows_tensor,
        )


def _slots(table: Sequence[int], start: int, end: int, block_size: int) -> list[int]:
    """Where positions `start .. end - 1` of a sequence lie, block by block."""
    slots: list[int] = []
    for index in range(start // block_size, -(-end // block_size)):
        first = index * block_size
        offset = table[index] * block_size - first
        slots += range(offset + max(start, first), offset + min(end, first + block_size))
    return slots


def _padded(block_tables: Sequence[Sequence[int]], counts: Sequence[int], width: int) -> list[int]:
    """The first blocks of each table, one table after the other, each padded to `width`."""
    padding = [PADDING_BLOCK] * width
    flat: list[int] = []
    for table, count in zip(block_tables, counts, strict=True):
        flat += table[:count]
        flat += padding[count:]
    return flat


def _check(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    blocks: Sequence[int],
) -> None:
    if not len(query_lens) or not len(query_lens) == len(context_lens) == len(block_tables):
        raise ValueError("a step needs a query length, a context length and a block table per sequence")
    for i, (query, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        if not 0 < query <= context:
            raise ValueError(f"sequence {i}: query length {query} does not fit context length {context}")
    for i, (table, needed) in enumerate(zip(block_tables, blocks, strict=True)):
        if len(table) < needed:
            raise ValueError(f"sequence {i}: {len(table)} blocks cannot hold {context_lens[i]} tokens")
