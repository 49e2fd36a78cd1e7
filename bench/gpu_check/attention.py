"""Paged attention: decodes and chunks of one step over scattered blocks, against float64."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import torch
from attention_references import Case
from bench.gpu_check.checks import Check, Setting, name_of, within

from sfllm_worker.backends import make_triton_attention
from sfllm_worker.kv.cache import KVLayer
from sfllm_worker.load.dummy import dummy_config
from sfllm_worker.model.attention import PLAIN, AttentionBatch, AttentionOptions, AttentionStep
from sfllm_worker.model.config import ModelConfig

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Shape(NamedTuple):
    """Heads and blocks."""

    heads: int
    kv_heads: int
    dim: int
    block_size: int


GPU_SHAPES = [
    Shape(16, 8, 128, 16), Shape(32, 8, 128, 256), Shape(9, 3, 64, 32), Shape(16, 2, 64, 64),
    Shape(32, 32, 96, 16), Shape(8, 4, 256, 16), Shape(8, 8, 256, 128), Shape(8, 1, 80, 32),
]  # fmt: skip
CPU_SHAPES = [Shape(4, 2, 16, 16)]
OPTIONS = {"": PLAIN, ", window of 40, soft cap": AttentionOptions(window=40, soft_cap=5.0)}


def checks(setting: Setting) -> list[Check]:
    """One for each format, shape and kind of attention."""
    return [
        Check(
            f"attention {name_of(dtype)} {shape.heads}x{shape.kv_heads} heads of {shape.dim}, "
            f"blocks of {shape.block_size}{text}",
            partial(attended, setting, dtype, shape, options),
        )
        for dtype in setting.dtypes
        for shape in (GPU_SHAPES if setting.on_gpu else CPU_SHAPES)
        for text, options in OPTIONS.items()
    ]


def attended(setting: Setting, dtype: torch.dtype, shape: Shape, options: AttentionOptions) -> str:
    """A step of decodes with one split and several, of full and ragged blocks, and chunks with context."""
    queries, contexts = [1, 1, 1, 1, 45, 30, 17], [1, 16, 256, 700, 45, 130, 300]
    if not setting.on_gpu:
        queries, contexts = [1, 1, 7, 5], [1, 33, 7, 20]
    case = Case(queries, contexts, *shape, dtype)
    layer = KVLayer(0, case.layer.k.to(setting.device), case.layer.v.to(setting.device))
    batch = moved(case.batch, setting.device)
    step = make_triton_attention(config_of(shape), dtype, setting.device).begin(batch)
    check_writing(step, layer, batch.slot_mapping)
    actual = step.attend(layer, case.q.to(setting.device), options)
    return within(actual, case.expected(options), TOLERANCES[dtype])


def check_writing(step: AttentionStep, layer: KVLayer, slots: torch.Tensor) -> None:
    """Write the step's keys and values to an empty cache: they must be at their slots, all else zero."""
    copies = KVLayer(0, torch.zeros_like(layer.k), torch.zeros_like(layer.v))
    tokens_of = [by_slot(cache)[slots] for cache in (layer.k, layer.v)]
    step.write_kv(copies, *tokens_of)
    for cache, tokens in zip((copies.k, copies.v), tokens_of, strict=True):
        expected = torch.zeros_like(by_slot(cache))
        expected[slots] = tokens
        assert torch.equal(by_slot(cache), expected), "keys or values are not at their slots alone"


def by_slot(cache: torch.Tensor) -> torch.Tensor:
    """`[slots, kv_heads, head_dim]` of a cache, copied."""
    return cache.transpose(1, 2).flatten(0, 1).contiguous()


def config_of(shape: Shape) -> ModelConfig:
    """A model with these heads."""
    options: dict[str, Any] = {
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.dim,
        "hidden_size": shape.heads * shape.dim,
    }
    return ModelConfig.from_hf({**dummy_config("tiny-llama"), **options})


def moved(batch: AttentionBatch, device: torch.device) -> AttentionBatch:
    """The batch with its tensors on a device."""
    tensors = ("block_tables", "context_lens_tensor", "slot_mapping", "positions", "last_rows")
    return dataclasses.replace(batch, **{name: getattr(batch, name).to(device) for name in tensors})
