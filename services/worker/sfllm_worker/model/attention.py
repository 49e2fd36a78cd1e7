"""Attention over the paged KV cache: the interface of backends, and the one in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch import Tensor

from sfllm_worker.kv.cache import KVLayer
from sfllm_worker.model.attention_batch import AttentionBatch
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.layers import soft_cap

__all__ = ["AttentionBackend", "AttentionBatch", "AttentionOptions", "AttentionStep", "TorchAttention"]


@dataclass(frozen=True)
class AttentionOptions:
    """How a layer's attention differs from plain causal attention."""

    window: int | None = None
    """A query sees only so many of the newest positions, its own included; None is all of them."""
    soft_cap: float | None = None
    """Scaled scores `s` become `soft_cap * tanh(s / soft_cap)`."""
    scale: float | None = None
    """What scores are multiplied by; None is `head_dim ** -0.5`."""


PLAIN = AttentionOptions()


class AttentionStep(Protocol):
    """Attention of one step: holds what all layers share, such as gather indices and masks."""

    def write_kv(self, layer: KVLayer, k: Tensor, v: Tensor) -> None:
        """Store `k` and `v`, each `[num_tokens, num_kv_heads, head_dim]`, at the step's slots."""
        ...

    def attend(self, layer: KVLayer, q: Tensor, options: AttentionOptions = PLAIN) -> Tensor:
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
    Layers with a window gather only the blocks that it touches.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._kv_heads = config.num_kv_heads

    def begin(self, batch: AttentionBatch) -> AttentionStep:
        """Prepare where keys and values go; gather indices and masks follow at their first use."""
        return _TorchStep(batch, self._kv_heads)


@dataclass(frozen=True)
class _Decodes:
    """Decode rows that are padded to one length together."""

    rows: Tensor | None
    """int64 token rows, or None when the group is all decodes in order."""
    pieces: Tensor
    """int64: which (block, head) pieces to gather, ordered by row, head, position."""
    count: int
    mask: Tensor
    """bool `[count, 1, 1, padded_len]`: True where a position is not to be seen."""


@dataclass(frozen=True)
class _Chunk:
    """A prefill chunk of one sequence."""

    start: int
    query_len: int
    length: int
    """Tokens that are gathered: the context, or the part of it that the window reaches."""
    pieces: Tensor
    mask: Tensor
    """bool `[query_len, length]`: True where a query may look."""


@dataclass(frozen=True)
class _Plan:
    """Gather indices and masks of the step, shared by all layers of one window."""

    decodes: list[_Decodes]
    chunks: list[_Chunk]


class _TorchStep:
    def __init__(self, batch: AttentionBatch, kv_heads: int) -> None:
        self._batch = batch
        self._kv_heads = kv_heads
        self._heads = torch.arange(kv_heads, device=batch.block_tables.device)
        block, offset = batch.slot_mapping // batch.block_size, batch.slot_mapping % batch.block_size
        heads_of_blocks = block[:, None] * kv_heads + self._heads
        self._slots = (heads_of_blocks * batch.block_size + offset[:, None]).reshape(-1)
        self._longest = max(batch.context_lens)
        self._plans: dict[int | None, _Plan] = {}

    def write_kv(self, layer: KVLayer, k: Tensor, v: Tensor) -> None:
        dim = k.shape[-1]
        layer.k.view(-1, dim).index_copy_(0, self._slots, k.reshape(-1, dim))
        layer.v.view(-1, dim).index_copy_(0, self._slots, v.reshape(-1, dim))

    def attend(self, layer: KVLayer, q: Tensor, options: AttentionOptions = PLAIN) -> Tensor:
        plan = self._plan(options.window)
        scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
        cap = options.soft_cap
        if len(plan.decodes) == 1 and not plan.chunks:
            return self._attend_decodes(layer, q, plan.decodes[0], scale, cap)
        out = torch.empty_like(q)
        for group in plan.decodes:
            if group.rows is None:
                rows = q[: group.count]
                out[: group.count] = self._attend_decodes(layer, rows, group, scale, cap)
            else:
                attended = self._attend_decodes(layer, q[group.rows], group, scale, cap)
                out.index_copy_(0, group.rows, attended)
        for chunk in plan.chunks:
            part = slice(chunk.start, chunk.start + chunk.query_len)
            out[part] = self._attend_chunk(layer, q[part], chunk, scale, cap)
        return out

    def _plan(self, window: int | None) -> _Plan:
        if window is not None and window >= self._longest:
            window = None  # nothing lies outside of it
        plan = self._plans.get(window)
        if plan is None:
            groups = [self._decode_group(rows, window) for rows in group_by_length(self._blocks(window))]
            plan = self._plans[window] = _Plan(groups, self._prefill_chunks(window))
        return plan

    def _blocks(self, window: int | None) -> list[int]:
        """How many blocks each decode has to gather."""
        batch = self._batch
        return [
            -(-context // batch.block_size) - _first_block(context, 1, window, batch.block_size)
            for context in batch.context_lens[: batch.num_decodes]
        ]

    def _decode_group(self, rows: list[int], window: int | None) -> _Decodes:
        batch, device = self._batch, self._batch.block_tables.device
        everything = len(rows) == batch.num_decodes
        if everything:
            rows = list(range(batch.num_decodes))
        index = None if everything else torch.tensor(rows, dtype=torch.int64, device=device)
        part: slice | Tensor = slice(0, batch.num_decodes) if index is None else index
        contexts = batch.context_lens_tensor[part, None]
        size = batch.block_size
        if window is None:
            width = -(-max(batch.context_lens[row] for row in rows) // size)
            tables = batch.block_tables[part, :width]
            unseen = torch.arange(width * size, device=device) >= contexts
        else:
            # By the tensor and not by the integers, which in a captured step are only bounds.
            first = (contexts - window).clamp_(min=0) // size
            longest = -(-max(batch.context_lens[row] for row in rows) // size)
            width = min(longest, (window + size - 2) // size + 1)
            # Shorter rows run past their last block; what is gathered there is masked.
            columns = (first + torch.arange(width, device=device)).clamp_(max=batch.block_tables.shape[1] - 1)
            tables = batch.block_tables[part].gather(1, columns)
            positions = first * size + torch.arange(width * size, device=device)
            unseen = (positions >= contexts) | (positions < contexts - window)
        return _Decodes(index, self._pieces(tables), len(rows), unseen[:, None, None])

    def _prefill_chunks(self, window: int | None) -> list[_Chunk]:
        batch, chunks, start = self._batch, [], self._batch.num_decodes
        for i in range(batch.num_decodes, len(batch.query_lens)):
            query_len, context_len = batch.query_lens[i], batch.context_lens[i]
            first = _first_block(context_len, query_len, window, batch.block_size)
            length = context_len - first * batch.block_size
            mask = torch.ones(query_len, length, dtype=torch.bool, device=batch.block_tables.device)
            mask = mask.tril_(length - query_len)
            if window is not None:
                mask = mask.triu_(length - query_len - window + 1)
            last = -(-context_len // batch.block_size)
            pieces = self._pieces(batch.block_tables[i : i + 1, first:last])
            chunks.append(_Chunk(start, query_len, length, pieces, mask))
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

    def _attend_decodes(
        self, layer: KVLayer, q: Tensor, group: _Decodes, scale: float, cap: float | None
    ) -> Tensor:
        """One query per sequence; query heads of a group share their key head as rows of one product."""
        # Written out, because torch's fused attention is slower on the CPU for one query a sequence.
        keys = self._gather(layer.k, group.pieces, group.count)
        grouped = q.view(group.count, self._kv_heads, -1, q.shape[-1])
        scores = torch.matmul(grouped * scale, keys.transpose(-1, -2))
        if cap is not None:
            scores = soft_cap(scores, cap)
        scores = scores.masked_fill_(group.mask, float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        del keys  # half of the padded copy, before the other half is made
        return torch.matmul(weights, self._gather(layer.v, group.pieces, group.count)).view(q.shape)

    def _attend_chunk(
        self, layer: KVLayer, q: Tensor, chunk: _Chunk, scale: float, cap: float | None
    ) -> Tensor:
        """Several queries of one sequence; expanded key heads cost no memory, they only repeat strides."""
        length, heads, dim = q.shape
        groups = heads // self._kv_heads
        shape = (self._kv_heads, groups, chunk.length, dim)
        keys = self._gather(layer.k, chunk.pieces, 1)[0, :, None, : chunk.length]
        values = self._gather(layer.v, chunk.pieces, 1)[0, :, None, : chunk.length]
        queries = q.view(length, self._kv_heads, groups, dim).permute(1, 2, 0, 3)
        if cap is None:
            out = F.scaled_dot_product_attention(
                queries, keys.expand(shape), values.expand(shape), attn_mask=chunk.mask, scale=scale
            )
        else:
            # The fused attention has no soft cap.
            scores = soft_cap(torch.matmul(queries * scale, keys.transpose(-1, -2)), cap)
            scores = scores.masked_fill_(~chunk.mask, float("-inf"))
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
            out = torch.matmul(weights, values)
        return out.permute(2, 0, 1, 3).reshape(length, heads, dim)


def _first_block(context_len: int, query_len: int, window: int | None, block_size: int) -> int:
    """The block with the oldest position that the oldest of the newest `query_len` tokens sees."""
    if window is None:
        return 0
    return max(0, context_len - query_len + 1 - window) // block_size


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
