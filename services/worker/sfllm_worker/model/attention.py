"""Attention over the paged KV cache: what a step looks like to it, and the backend in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch import Tensor

from sfllm_worker.kv.cache import PADDING_BLOCK, KVLayer
from sfllm_worker.model.config import ModelConfig


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


class AttentionStep(Protocol):
    """Attention of one step: holds what all layers share, such as gather indices and masks."""

    def write_kv(self, layer: KVLayer, k: Tensor, v: Tensor) -> None:
        """Store `k` and `v`, each `[num_tokens, num_kv_heads, head_dim]`, at the step's slots."""
        ...

    def attend(self, layer: KVLayer, q: Tensor) -> Tensor:
        """Attend with `q` `[num_tokens, num_heads, head_dim]`; returns the same shape."""
        ...


class AttentionBackend(Protocol):
    """A way to run attention over the paged cache."""

    def begin(self, batch: AttentionBatch) -> AttentionStep:
        """Prepare a step, once for all layers."""
        ...


class TorchAttention:
    """The backend in plain torch, for any device.

    Decodes gather their blocks into padded batches of like length; chunks run one sequence at a time.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._kv_heads = config.num_kv_heads
        self._scale = config.head_dim**-0.5

    def begin(self, batch: AttentionBatch) -> AttentionStep:
        """Prepare gather indices and masks."""
        return _TorchStep(batch, self._kv_heads, self._scale)


@dataclass(frozen=True)
class _Decodes:
    """Decode rows that are padded to one length together."""

    rows: Tensor | None
    """int64 token rows, or None when the group is all decodes in order."""
    pieces: Tensor
    """int64: which (block, head) pieces to gather, ordered by row, head, position."""
    count: int
    mask: Tensor
    """bool `[count, 1, 1, padded_len]`: True where a position lies beyond the context."""


@dataclass(frozen=True)
class _Chunk:
    """A prefill chunk of one sequence."""

    start: int
    query_len: int
    context_len: int
    pieces: Tensor
    mask: Tensor
    """bool `[query_len, context_len]`: True where a query may look."""


class _TorchStep:
    def __init__(self, batch: AttentionBatch, kv_heads: int, scale: float) -> None:
        self._batch = batch
        self._kv_heads = kv_heads
        self._scale = scale
        self._heads = torch.arange(kv_heads, device=batch.block_tables.device)
        block, offset = batch.slot_mapping // batch.block_size, batch.slot_mapping % batch.block_size
        heads_of_blocks = block[:, None] * kv_heads + self._heads
        self._slots = (heads_of_blocks * batch.block_size + offset[:, None]).reshape(-1)
        self._decodes = [self._decode_group(rows) for rows in group_by_length(self._decode_blocks())]
        self._chunks = self._prefill_chunks()

    def write_kv(self, layer: KVLayer, k: Tensor, v: Tensor) -> None:
        dim = k.shape[-1]
        layer.k.view(-1, dim).index_copy_(0, self._slots, k.reshape(-1, dim))
        layer.v.view(-1, dim).index_copy_(0, self._slots, v.reshape(-1, dim))

    def attend(self, layer: KVLayer, q: Tensor) -> Tensor:
        if len(self._decodes) == 1 and not self._chunks:
            return self._attend_decodes(layer, q, self._decodes[0])
        out = torch.empty_like(q)
        for group in self._decodes:
            if group.rows is None:
                out[: group.count] = self._attend_decodes(layer, q[: group.count], group)
            else:
                out.index_copy_(0, group.rows, self._attend_decodes(layer, q[group.rows], group))
        for chunk in self._chunks:
            rows = slice(chunk.start, chunk.start + chunk.query_len)
            out[rows] = self._attend_chunk(layer, q[rows], chunk)
        return out

    def _decode_blocks(self) -> list[int]:
        batch = self._batch
        return [-(-context // batch.block_size) for context in batch.context_lens[: batch.num_decodes]]

    def _decode_group(self, rows: list[int]) -> _Decodes:
        batch = self._batch
        everything = len(rows) == batch.num_decodes
        if everything:
            rows = list(range(batch.num_decodes))
        device = batch.block_tables.device
        index = None if everything else torch.tensor(rows, dtype=torch.int64, device=device)
        part: slice | Tensor = slice(0, batch.num_decodes) if index is None else index
        width = -(-max(batch.context_lens[row] for row in rows) // batch.block_size)
        positions = torch.arange(width * batch.block_size, device=device)
        beyond = positions >= batch.context_lens_tensor[part, None]
        return _Decodes(
            index, self._pieces(batch.block_tables[part, :width]), len(rows), beyond[:, None, None]
        )

    def _prefill_chunks(self) -> list[_Chunk]:
        batch, chunks, start = self._batch, [], self._batch.num_decodes
        for i in range(batch.num_decodes, len(batch.query_lens)):
            query_len, context_len = batch.query_lens[i], batch.context_lens[i]
            width = -(-context_len // batch.block_size)
            mask = torch.ones(query_len, context_len, dtype=torch.bool, device=batch.block_tables.device)
            mask = mask.tril_(context_len - query_len)
            pieces = self._pieces(batch.block_tables[i : i + 1, :width])
            chunks.append(_Chunk(start, query_len, context_len, pieces, mask))
            start += query_len
        return chunks

    def _pieces(self, tables: Tensor) -> Tensor:
        """Rows of the cache seen as `[num_blocks * num_kv_heads, ...]`, in order (sequence, head, block).

        Gathering in this order puts a head's tokens next to each other in one copy.
        """
        return (tables[:, None, :] * self._kv_heads + self._heads[None, :, None]).reshape(-1)

    def _gather(self, cache: Tensor, pieces: Tensor, sequences: int) -> Tensor:
        """Keys or values `[sequences, num_kv_heads, padded_len, head_dim]` of the given pieces."""
        flat = cache.view(cache.shape[0] * self._kv_heads, -1)
        return flat.index_select(0, pieces).view(sequences, self._kv_heads, -1, cache.shape[-1])

    def _attend_decodes(self, layer: KVLayer, q: Tensor, group: _Decodes) -> Tensor:
        """One query per sequence; query heads of a group share their key head as rows of one product."""
        # Written out, because torch's fused attention is slower on the CPU for one query a sequence.
        keys = self._gather(layer.k, group.pieces, group.count)
        grouped = q.view(group.count, self._kv_heads, -1, q.shape[-1])
        scores = torch.matmul(grouped * self._scale, keys.transpose(-1, -2))
        scores = scores.masked_fill_(group.mask, float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        del keys  # half of the padded copy, before the other half is made
        return torch.matmul(weights, self._gather(layer.v, group.pieces, group.count)).view(q.shape)

    def _attend_chunk(self, layer: KVLayer, q: Tensor, chunk: _Chunk) -> Tensor:
        """Several queries of one sequence; expanded key heads cost no memory, they only repeat strides."""
        length, heads, dim = q.shape
        groups = heads // self._kv_heads
        shape = (self._kv_heads, groups, chunk.context_len, dim)
        keys = self._gather(layer.k, chunk.pieces, 1)[0, :, None, : chunk.context_len]
        values = self._gather(layer.v, chunk.pieces, 1)[0, :, None, : chunk.context_len]
        out = F.scaled_dot_product_attention(
            q.view(length, self._kv_heads, groups, dim).permute(1, 2, 0, 3),
            keys.expand(shape),
            values.expand(shape),
            attn_mask=chunk.mask,
            scale=self._scale,
        )
        return out.permute(2, 0, 1, 3).reshape(length, heads, dim)


def group_by_length(blocks: Sequence[int], max_ratio: float = 2.0) -> list[list[int]]:
    """Split rows into groups in which the longest has at most `max_ratio` times the shortest's blocks.

    `blocks` is each row's number of blocks. One long row among short ones would otherwise make all of
    them as costly as itself; the ratio bounds the padding and keeps the groups to a logarithmic few.
    Groups are ordered from long to short.
    """
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(blocks)), key=lambda i: -blocks[i]):
        if not groups or blocks[row] * max_ratio < longest:
            groups.append([])
            longest = blocks[row]
        groups[-1].append(row)
    return groups
