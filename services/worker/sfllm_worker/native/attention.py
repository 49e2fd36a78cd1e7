"""Native attention as a backend, for models whose other parts run elsewhere."""

from __future__ import annotations

import ctypes
from ctypes import byref

import torch
from torch import Tensor

from sfllm_worker.kv.cache import KVLayer
from sfllm_worker.model.attention import (
    PLAIN,
    AttentionBackend,
    AttentionBatch,
    AttentionOptions,
    AttentionStep,
    TorchAttention,
)
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.native import structures as s
from sfllm_worker.native.library import check, native_library

ELEMENT_TYPES = {torch.float32: s.FLOAT32, torch.bfloat16: s.BFLOAT16}


def fitting_library(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ctypes.CDLL | None:
    """The native library if it can run such a model there, else None."""
    # Two neighbouring bfloat16 are multiplied at once.
    if device.type != "cpu" or dtype not in ELEMENT_TYPES or config.head_dim % 2:
        return None
    return native_library()


def make_attention(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    """The fastest backend for such a model."""
    library = fitting_library(config, dtype, device)
    return TorchAttention(config) if library is None else NativeAttention(config, library)


def batch_spec(batch: AttentionBatch) -> s.StepSpec:
    """What a step looks like to attention; the batch must live as long."""
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
    """Attention that reads the block tables in place; keys and values are stored by torch."""

    def __init__(self, config: ModelConfig, library: ctypes.CDLL) -> None:
        self._library = library
        self._torch = TorchAttention(config)

    def begin(self, batch: AttentionBatch) -> AttentionStep:
        """Prepare a step, once for all layers."""
        return _NativeStep(self._library, self._torch.begin(batch), batch)


class _NativeStep:
    def __init__(self, library: ctypes.CDLL, torch_step: AttentionStep, batch: AttentionBatch) -> None:
        self._library = library
        self._batch = batch
        self._spec = batch_spec(batch)
        self.write_kv = torch_step.write_kv

    def attend(self, layer: KVLayer, q: Tensor, options: AttentionOptions = PLAIN) -> Tensor:
        rows, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype)
        _, heads, head_dim = q.shape
        spec = s.AttentionSpec(
            element_type=ELEMENT_TYPES[q.dtype],
            heads=heads,
            kv_heads=layer.k.shape[1],
            head_dim=head_dim,
            block_size=self._batch.block_size,
            window=options.window or 0,
            scale=head_dim**-0.5 if options.scale is None else options.scale,
            soft_cap=options.soft_cap or 0.0,
            queries=rows.data_ptr(),
            keys=layer.k.data_ptr(),
            values=layer.v.data_ptr(),
            result=out.data_ptr(),
        )
        check(self._library.sfllm_attend(byref(spec), byref(self._spec)))
        return out
