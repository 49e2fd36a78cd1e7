"""Native attention as a backend, for models whose other parts run elsewhere."""

from __future__ import annotations

import ctypes
from ctypes import byref

import torch
from torch import Tensor

from sfllm_worker.kv.cache import KVLayer
from sfllm_worker.model.attention import PLAIN, AttentionBatch, AttentionOptions, AttentionStep
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.native import structures as s
from sfllm_worker.native.choice import native_library
from sfllm_worker.native.library import check
from sfllm_worker.native.panels import columns_fill_words

ELEMENT_TYPES = {torch.float32: s.FLOAT32, torch.bfloat16: s.BFLOAT16}


def fitting_library(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ctypes.CDLL | None:
    """The native library if it can run such a model there, else None."""
    if device.type != "cpu" or dtype not in ELEMENT_TYPES:
        return None
    # Two neighbouring bfloat16 are multiplied at once.
    columns = (config.hidden_size, config.head_dim, config.intermediate_size)
    return native_library() if all(columns_fill_words(size, dtype) for size in columns) else None


def batch_spec(batch: AttentionBatch) -> s.StepSpec:
    """What a step looks like to attention; the batch must live as long. Raises ValueError for odd blocks."""
    if batch.block_size % 2:
        # Two neighbouring tokens share a word of the values.
        raise ValueError(f"block_size must be even for native attention, not {batch.block_size}")
    return s.StepSpec(
        num_tokens=batch.num_tokens,
        num_sequences=len(batch.context_lens),
        table_width=batch.block_tables.shape[1],
        positions=batch.positions.data_ptr(),
        slots=batch.slot_mapping.data_ptr(),
        context_lens=batch.context_lens_tensor.data_ptr(),
        last_rows=batch.last_rows.data_ptr(),
        block_tables=batch.block_tables.data_ptr(),
        threads=torch.get_num_threads(),
    )


class NativeAttention:
    """Attention that reads the block tables in place, over a cache laid out as `src/blocks.h` says."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def begin(self, batch: AttentionBatch) -> AttentionStep:
        """Prepare a step, once for all layers."""
        return _NativeStep(self._library, batch)


class _NativeStep:
    def __init__(self, library: ctypes.CDLL, batch: AttentionBatch) -> None:
        self._library = library
        self._batch = batch
        self._step = batch_spec(batch)

    def write_kv(self, layer: KVLayer, k: Tensor, v: Tensor) -> None:
        keys, values = k.contiguous(), v.contiguous()
        spec = self._spec(layer, heads=k.shape[1])
        self._library.sfllm_store_kv(byref(spec), byref(self._step), keys.data_ptr(), values.data_ptr())

    def attend(self, layer: KVLayer, q: Tensor, options: AttentionOptions = PLAIN) -> Tensor:
        rows, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype)
        spec = self._spec(layer, heads=q.shape[1])
        spec.window = options.window or 0
        spec.scale = q.shape[2] ** -0.5 if options.scale is None else options.scale
        spec.soft_cap = options.soft_cap or 0.0
        spec.queries, spec.result = rows.data_ptr(), out.data_ptr()
        check(self._library.sfllm_attend(byref(spec), byref(self._step)))
        return out

    def _spec(self, layer: KVLayer, heads: int) -> s.AttentionSpec:
        _, kv_heads, block_size, head_dim = layer.k.shape
        return s.AttentionSpec(
            element_type=ELEMENT_TYPES[layer.k.dtype],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            keys=layer.k.data_ptr(),
            values=layer.v.data_ptr(),
        )
