"""Attention over the paged cache by the Triton kernels: decodes in one launch or two, chunks in one."""

from __future__ import annotations

import torch
from torch import Tensor

from sfllm_worker.kernels.attention_scratch import DecodeScratch
from sfllm_worker.kernels.attention_write import write_kv
from sfllm_worker.kernels.decode_attention import decode_attention
from sfllm_worker.kernels.prefill_attention import (
    prefill_attention,
    queries_per_tile,
    query_tiles,
    single_tiles,
)
from sfllm_worker.kv.cache import KVLayer
from sfllm_worker.model.attention import PLAIN, AttentionOptions
from sfllm_worker.model.attention_batch import AttentionBatch
from sfllm_worker.model.config import ModelConfig


class TritonAttention:
    """The backend of GPUs. Its steps share scratch, so they must run one after another on one stream.

    A step of decodes alone may be captured: its launches depend on `max(context_lens)` of the batch's
    python integers and on nothing else of them, and read all else from its tensors. Room for it must
    have been reserved.

    With `decodes_as_chunks`, decodes run through the chunks' kernel, one query a program. A token's
    attention then has the same bits whether it was decoded or recomputed in a chunk after a preemption,
    which splits of the context would round otherwise. Long contexts of few rows are slower for it, as one
    program reads all of a context.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        decodes_as_chunks: bool = False,
    ) -> None:
        self._decodes_as_chunks = decodes_as_chunks
        self._scratch = DecodeScratch(config.num_heads, config.head_dim, device)
        self._tile = queries_per_tile(config.num_heads, config.num_kv_heads, config.head_dim, dtype.itemsize)

    @staticmethod
    def bytes_needed(config: ModelConfig, rows: int, longest: int) -> int:
        """Bytes of device memory that `reserve` takes for `rows` decodes of up to `longest` tokens."""
        return DecodeScratch.bytes_needed(rows, longest, config.num_heads, config.head_dim)

    def reserve(self, rows: int, longest: int) -> None:
        """Make room for steps of up to `rows` decodes with contexts of up to `longest` tokens.

        Larger steps make room by themselves, outside of captures. Captured graphs stay valid.
        """
        if not self._decodes_as_chunks:
            self._scratch.reserve(rows, longest)

    def begin(self, batch: AttentionBatch) -> TritonStep:
        """Prepare a step: sends the list of the chunks' tiles, without waiting for the device.

        Raises `RuntimeError` in a capture that needs more scratch than was reserved.
        """
        split = 0 if self._decodes_as_chunks else batch.num_decodes
        longest = max(batch.context_lens[:split], default=0)
        if split:
            self._scratch.reserve(split, longest)
        device, sequences = batch.block_tables.device, len(batch.query_lens)
        tiles = None
        if batch.num_decodes == sequences and split == 0:
            tiles = single_tiles(sequences, device)
        elif split < sequences:
            tiles = query_tiles(batch.query_lens, batch.context_lens, split, self._tile, device)
        return TritonStep(batch, split, longest, tiles, self._scratch)


class TritonStep:
    """Attention of one step; see `AttentionStep`."""

    def __init__(
        self, batch: AttentionBatch, split: int, longest: int, tiles: Tensor | None, scratch: DecodeScratch
    ) -> None:
        self._batch, self._tiles, self._scratch = batch, tiles, scratch
        self._split, self._longest = split, longest

    def write_kv(self, layer: KVLayer, k: Tensor, v: Tensor) -> None:
        """Store `k` and `v`, each `[num_tokens, num_kv_heads, head_dim]`, at the step's slots."""
        write_kv(layer, k, v, self._batch.slot_mapping)

    def attend(self, layer: KVLayer, q: Tensor, options: AttentionOptions = PLAIN) -> Tensor:
        """Attend with `q` `[num_tokens, num_heads, head_dim]`, strided or not; returns the same shape."""
        batch = self._batch
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tables, contexts = batch.block_tables, batch.context_lens_tensor
        if self._split:
            split, longest = self._split, self._longest
            decode_attention(out, q, layer, tables, contexts, split, longest, self._scratch, options)
        if self._tiles is not None:
            prefill_attention(out, q, layer, self._tiles, tables, contexts, options)
        return out
