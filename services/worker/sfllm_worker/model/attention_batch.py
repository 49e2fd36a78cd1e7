"""What a step of several sequences looks like to attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfllm_worker.kv.cache import PADDING_BLOCK

Integers = npt.NDArray[np.int64]


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
        queries = np.array(query_lens, dtype=np.int64)
        contexts = np.array(context_lens, dtype=np.int64)
        blocks = (contexts + (block_size - 1)) // block_size
        _check(queries, contexts, block_tables, blocks)
        longer = np.flatnonzero(queries != 1)
        # NumPy on the host, because torch takes several times as long for tensors as small as these.
        tables = _padded(block_tables, blocks.tolist())
        ends = queries.cumsum()
        num_tokens = int(ends[-1])
        rows = np.repeat(np.arange(len(queries)), queries)
        positions = np.arange(num_tokens) + (contexts - ends)[rows]
        slots = tables[rows, positions // block_size] * block_size + positions % block_size
        return cls(
            query_lens=tuple(query_lens),
            context_lens=tuple(context_lens),
            num_decodes=int(longer[0]) if len(longer) else len(queries),
            num_tokens=num_tokens,
            block_size=block_size,
            block_tables=torch.from_numpy(tables).to(device),
            context_lens_tensor=torch.from_numpy(contexts).to(device),
            slot_mapping=torch.from_numpy(slots).to(device),
            positions=torch.from_numpy(positions).to(device),
            last_rows=torch.from_numpy(ends - 1).to(device),
        )


def _padded(block_tables: Sequence[Sequence[int]], counts: list[int]) -> Integers:
    """The first blocks of each table, padded to the longest."""
    width = max(counts)
    padding = [PADDING_BLOCK] * width
    flat: list[int] = []
    for table, count in zip(block_tables, counts, strict=True):
        flat += table[:count]
        flat += padding[count:]
    return np.array(flat, dtype=np.int64).reshape(-1, width)


def _check(
    queries: Integers, contexts: Integers, block_tables: Sequence[Sequence[int]], blocks: Integers
) -> None:
    if not len(queries) or not len(queries) == len(contexts) == len(block_tables):
        raise ValueError("a step needs a query length, a context length and a block table per sequence")
    for i in np.flatnonzero((queries < 1) | (queries > contexts)).tolist():
        raise ValueError(f"sequence {i}: query length {queries[i]} does not fit context length {contexts[i]}")
    lengths = np.array([len(table) for table in block_tables])
    for i in np.flatnonzero(lengths < blocks).tolist():
        raise ValueError(f"sequence {i}: {lengths[i]} blocks cannot hold {contexts[i]} tokens")
