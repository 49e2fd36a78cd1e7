"""Builds a decoder's weights from named tensors, by the names that Hugging Face checkpoints use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.decoder import DecoderWeights, LayerWeights
from sfllm_worker.model.layers import Linear, make_linear


class TensorSource(Protocol):
    """Where tensors come from: files, or a random generator."""

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that name, in the dtype it is stored in; the caller copies it.

        Raises `ModelLoadError`, naming the tensor, when it is missing or has another shape.
        """
        ...


@dataclass(frozen=True)
class _Builder:
    source: TensorSource
    dtype: torch.dtype
    device: torch.device

    def vector(self, name: str, size: int) -> Tensor:
        return self.matrix(name, (size,))

    def matrix(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # A copy even where nothing changes: memory of our own is aligned and cannot be paged out to a file.
        return self.source.take(name, shape).to(self.device, self.dtype, copy=True)

    def norm(self, name: str, size: int, *, unit_offset: bool) -> Tensor:
        """A norm's weight; one that lacks its centre is completed in float32, where its sum is exact."""
        if not unit_offset:
            return self.vector(name, size)
        return self.source.take(name, (size,)).to(self.device, torch.float32) + 1

    def linear(self, names: Sequence[str], out_sizes: Sequence[int], in_size: int, *, bias: bool) -> Linear:
        """One linear layer from several stored ones, stacked along their outputs."""
        total = sum(out_sizes)
        weight = torch.empty(total, in_size, dtype=self.dtype, device=self.device)
        stacked_bias = torch.empty(total, dtype=self.dtype, device=self.device) if bias else None
        start = 0
        for name, size in zip(names, out_sizes, strict=True):
            weight[start : start + size] = self.source.take(f"{name}.weight", (size, in_size))
            if stacked_bias is not None:
                stacked_bias[start : start + size] = self.source.take(f"{name}.bias", (size,))
            start += size
        return make_linear(weight, stacked_bias)


def build_weights(
    config: ModelConfig, source: TensorSource, dtype: torch.dtype, device: torch.device
) -> DecoderWeights:
    """Copy all weights of a model into `dtype` on `device`, fused as the decoder wants them."""
    builder = _Builder(source, dtype, device)
    embedding = builder.matrix("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    layers = tuple(_layer(config, builder, f"model.layers.{i}") for i in range(config.num_layers))
    if config.tie_word_embeddings:
        head = make_linear(embedding)
    else:
        head = builder.linear(["lm_head"], [config.vocab_size], config.hidden_size, bias=False)
    final_norm = builder.norm("model.norm.weight", config.hidden_size, unit_offset=config.unit_offset_norms)
    return DecoderWeights(embedding, layers, final_norm, head)


def _layer(config: ModelConfig, builder: _Builder, prefix: str) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    if config.fused_projections:
        qkv_parts, gate_up_parts = {"qkv": config.q_size + 2 * config.kv_size}, {"gate_up": 2 * inner}
    else:
        qkv_parts = {"q": config.q_size, "k": config.kv_size, "v": config.kv_size}
        gate_up_parts = {"gate": inner, "up": inner}

    def projection(module: str, parts: Mapping[str, int], in_size: int, *, bias: bool) -> Linear:
        names = [f"{module}.{part}_proj" for part in parts]
        return builder.linear(names, list(parts.values()), in_size, bias=bias)

    def norm(name: str) -> Tensor:
        return builder.norm(f"{prefix}.{name}_layernorm.weight", hidden, unit_offset=config.unit_offset_norms)

    sandwich = config.sandwich_norms
    return LayerWeights(
        input_norm=norm("input"),
        qkv=projection(attention, qkv_parts, hidden, bias=config.attention_bias),
        qk_norm=_qk_norm(config, builder, attention) if config.qk_norm else None,
        attention_output=projection(
            attention, {"o": hidden}, config.q_size, bias=config.attention_output_bias
        ),
        post_attention_norm=norm("post_attention") if sandwich else None,
        pre_feedforward_norm=norm("pre_feedforward" if sandwich else "post_attention"),
        gate_up=projection(mlp, gate_up_parts, hidden, bias=config.mlp_bias),
        down=projection(mlp, {"down": hidden}, inner, bias=config.mlp_bias),
        post_feedforward_norm=norm("post_feedforward") if sandwich else None,
    )


def _qk_norm(config: ModelConfig, builder: _Builder, attention: str) -> Tensor:
    """The norms of queries and keys as one weight per head, so that one operation norms both."""
    query, key = (
        builder.norm(f"{attention}.{part}_norm.weight", config.head_dim, unit_offset=config.unit_offset_norms)
        for part in "qk"
    )
    return torch.cat((query.expand(config.num_heads, -1), key.expand(config.num_kv_heads, -1)), dim=0)
