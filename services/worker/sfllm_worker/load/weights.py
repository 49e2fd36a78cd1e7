"""Builds a decoder's weights from named tensors, by the names that Hugging Face checkpoints use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.decoder import DecoderWeights, LayerWeights
from sfllm_worker.model.errors import ModelLoadError
from sfllm_worker.model.layers import Embedding, Linear, make_linear
from sfllm_worker.quant.channels import ChannelEmbedding, ChannelLinear
from sfllm_worker.quant.linear import QuantizedEmbedding, QuantizedLinear
from sfllm_worker.quant.policy import EMBEDDING, bits_of
from sfllm_worker.quant.products import LinearMaker
from sfllm_worker.quant.quantize import quantize
from sfllm_worker.quant.weight import QuantizedWeight, stack


class TensorSource(Protocol):
    """Where tensors come from: files, or a random generator."""

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that name, in the dtype it is stored in; the caller copies it.

        Raises `ModelLoadError`, naming the tensor, when it is missing or has another shape.
        """
        ...

    def take_quantized(self, name: str, shape: tuple[int, int], /) -> QuantizedWeight | None:
        """The weight of that name if it is stored quantized, else None. Raises as `take` does."""
        ...


@dataclass(frozen=True)
class _Builder:
    source: TensorSource
    dtype: torch.dtype
    device: torch.device
    tied: bool
    bits: int | None
    """Of the layers' weights; None leaves all weights as floats."""
    make_linear: LinearMaker
    """For weights as floats on the device, which it may quantize there."""

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

    def quantized(self, name: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        """The weight of that name if it is to be quantized, else None."""
        bits = bits_of(name, self.bits, tied=self.tied)
        if bits is None:
            return None
        stored = self.source.take_quantized(name, shape)
        if stored is not None:
            return stored
        try:
            return quantize(self.source.take(name, shape), bits)
        except ValueError as error:
            raise ModelLoadError(f"tensor {name} cannot be quantized: {error}") from error

    def linear(self, names: Sequence[str], out_sizes: Sequence[int], in_size: int, *, bias: bool) -> Linear:
        """One linear layer from several stored ones, stacked along their outputs."""
        stacked_bias = torch.empty(sum(out_sizes), dtype=self.dtype, device=self.device) if bias else None
        if stacked_bias is not None:
            for name, part in zip(names, torch.split(stacked_bias, list(out_sizes)), strict=True):
                part.copy_(self.source.take(f"{name}.bias", tuple(part.shape)))
        shapes = [(size, in_size) for size in out_sizes]
        parts = [self.quantized(f"{name}.weight", shape) for name, shape in zip(names, shapes, strict=True)]
        if all(part is not None for part in parts):
            quantized = stack([part for part in parts if part is not None])
            return QuantizedLinear(quantized, stacked_bias, self.dtype)
        weight = torch.empty(sum(out_sizes), in_size, dtype=self.dtype, device=self.device)
        for name, part in zip(names, torch.split(weight, list(out_sizes)), strict=True):
            part.copy_(self.source.take(f"{name}.weight", (len(part), in_size)))
        return self.dense_linear(names[0], weight, stacked_bias)

    def dense_linear(self, name: str, weight: Tensor, bias: Tensor | None) -> Linear:
        """A linear layer of a weight of floats; `name` is for errors."""
        try:
            return self.make_linear(weight, bias)
        except ValueError as error:
            raise ModelLoadError(f"tensor {name} cannot be quantized: {error}") from error


def build_weights(
    config: ModelConfig,
    source: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    bits: int | None = None,
    make_linear: LinearMaker = make_linear,
) -> DecoderWeights:
    """Copy all weights of a model into `dtype` on `device`, fused as the decoder wants them.

    With `bits`, those that `bits_of` names are quantized before; `make_linear` gets the others of products.
    """
    builder = _Builder(source, dtype, device, config.tie_word_embeddings, bits, make_linear)
    embedding, tied_head = _embedding(config, builder)
    layers = tuple(_layer(config, builder, f"model.layers.{i}") for i in range(config.num_layers))
    head = tied_head or builder.linear(["lm_head"], [config.vocab_size], config.hidden_size, bias=False)
    final_norm = builder.norm("model.norm.weight", config.hidden_size, unit_offset=config.unit_offset_norms)
    return DecoderWeights(embedding, layers, final_norm, head)


def _embedding(config: ModelConfig, builder: _Builder) -> tuple[Tensor | Embedding, Linear | None]:
    """The embedding, and the head when that is the same weight."""
    shape = (config.vocab_size, config.hidden_size)
    quantized = builder.quantized(EMBEDDING, shape)
    if quantized is not None:
        embedding = QuantizedEmbedding(quantized, builder.dtype)
        return embedding, QuantizedLinear(quantized, None, builder.dtype)
    dense = builder.matrix(EMBEDDING, shape)
    if not config.tie_word_embeddings:
        return dense, None
    head = builder.dense_linear(EMBEDDING, dense, None)
    if isinstance(head, ChannelLinear):
        return ChannelEmbedding(head.weight, builder.dtype), head
    return dense, head


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
