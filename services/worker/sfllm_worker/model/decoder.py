"""One decoder for all supported families, configured by `ModelConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sfllm_worker.kv.cache import KVCache, KVLayer
from sfllm_worker.model.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionOptions,
    AttentionStep,
    TorchAttention,
)
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.layers import ACTIVATIONS, Embedding, Linear, embed, rms_norm, soft_cap, some_rows
from sfllm_worker.model.rope import Rotary, apply_rotation


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one decoder layer; query, key and value are one product, so are gate and up.

    Norms are `[hidden_size]`.
    """

    input_norm: Tensor
    qkv: Linear
    """hidden_size to q_size + 2 * kv_size."""
    qk_norm: Tensor | None
    """`[num_heads + num_kv_heads, head_dim]`: the query norm's weight per query head, then the key norm's."""
    attention_output: Linear
    post_attention_norm: Tensor | None
    """Of what attention adds; not what Hugging Face's Llama calls by this name, which is the next one."""
    pre_feedforward_norm: Tensor
    gate_up: Linear
    """hidden_size to 2 * intermediate_size."""
    down: Linear
    post_feedforward_norm: Tensor | None


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a model, on one device, in one dtype or quantized for activations of one dtype."""

    embedding: Tensor | Embedding
    """`[vocab_size, hidden_size]`."""
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    """`[hidden_size]`."""
    head: Linear
    """hidden_size to vocab_size; shares the embedding's memory when the model ties them."""


class TextModel(Protocol):
    """What an engine runs: `Decoder`, or a model of transformers behind the same calls."""

    config: ModelConfig

    @property
    def dtype(self) -> torch.dtype:
        """Element type of weights, activations and KV."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights; a tied head is counted once."""
        ...

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        kv: KVCache,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run one step: final, normed hidden rows; see `Decoder.forward`."""
        ...

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Logits float32 `[n, vocab_size]` of rows `[n, hidden_size]` of `forward`'s result.

        They are valid until the next call, and the caller may change them.
        """
        ...


class Decoder:
    """A decoder-only transformer for inference: token rows in, hidden rows out, KV in a paged cache.

    Rows of different sequences stand in one flat batch described by `AttentionBatch`. The caller runs
    under `torch.inference_mode()`.
    """

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, attention: AttentionBackend | None = None
    ) -> None:
        self.config = config
        self.weights = weights
        self.attention = attention or TorchAttention(config)
        self._activation = ACTIVATIONS[config.activation]
        scale = config.embedding_scale
        # Rounded as the weights are, which is what the checkpoints were trained with.
        self._embedding_scale = None if scale is None else torch.tensor(scale).to(self.dtype).item()
        kinds = tuple(dict.fromkeys(rope for rope in config.ropes if rope is not None))
        self._rotaries = [Rotary(rope, self.device) for rope in kinds]
        self._layers = tuple(
            _Layer(
                AttentionOptions(window, config.attention_soft_cap, config.attention_scale),
                None if rope is None else kinds.index(rope),
            )
            for window, rope in zip(config.windows, config.ropes, strict=True)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Element type of weights, activations and KV."""
        return self.weights.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.weights.embedding.device

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights; a tied head is counted once."""
        total = self.weights.embedding.nbytes + self.weights.final_norm.nbytes
        if not self.config.tie_word_embeddings:
            total += self.weights.head.weight_bytes
        for layer in self.weights.layers:
            total += sum(linear.weight_bytes for linear in _linears(layer))
            total += sum(norm.nbytes for norm in _norms(layer))
        return total

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        kv: KVCache,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run one step and write its keys and values into `kv`.

        `token_ids` and `positions` are int64 `[num_tokens]` in the order of `batch`, `rows` int64 `[n]` the
        tokens whose results are wanted, all if it is None. Returns their final, normed hidden rows
        `[n, hidden_size]`.
        """
        step = self.attention.begin(batch)
        rotations = [rotary.rotation(positions, self.dtype) for rotary in self._rotaries]
        hidden = embed(token_ids, self.weights.embedding)
        if self._embedding_scale is not None:
            hidden *= self._embedding_scale
        eps = self.config.rms_norm_eps
        for weights, kind, layer in zip(self.weights.layers, self._layers, kv.layers, strict=True):
            normed = rms_norm(hidden, weights.input_norm, eps)
            rotation = None if kind.rotation is None else rotations[kind.rotation]
            attended = self._attention(weights, layer, step, normed, rotation, kind.options)
            if weights.post_attention_norm is not None:
                attended = rms_norm(attended, weights.post_attention_norm, eps)
            hidden += attended
            normed = rms_norm(hidden, weights.pre_feedforward_norm, eps)
            fed = weights.down(self._activation(weights.gate_up(normed)))
            if weights.post_feedforward_norm is not None:
                fed = rms_norm(fed, weights.post_feedforward_norm, eps)
            hidden += fed
        return rms_norm(some_rows(hidden, rows), self.weights.final_norm, eps)

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Logits float32 `[n, vocab_size]` of the given rows `[n, hidden_size]` of `forward`'s result.

        They are valid until the next call, and the caller may change them.
        """
        logits = self.weights.head(hidden_rows)
        if self.config.final_soft_cap is not None:
            logits = soft_cap(logits, self.config.final_soft_cap)
        return logits.to(torch.float32)

    def _attention(
        self,
        weights: LayerWeights,
        layer: KVLayer,
        step: AttentionStep,
        normed: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        options: AttentionOptions,
    ) -> Tensor:
        config = self.config
        rows = normed.shape[0]
        heads, rotated = config.num_heads, config.num_heads + config.num_kv_heads
        qkv = weights.qkv(normed).view(rows, rotated + config.num_kv_heads, config.head_dim)
        # Queries and keys are normed and rotated as one tensor: half the operations.
        qk, v = qkv[:, :rotated], qkv[:, rotated:]
        if weights.qk_norm is not None:
            qk = rms_norm(qk, weights.qk_norm, config.rms_norm_eps)
        if rotation is not None:
            qk = apply_rotation(qk, *rotation)
        step.write_kv(layer, qk[:, heads:], v)
        attended = step.attend(layer, qk[:, :heads], options)
        return weights.attention_output(attended.reshape(rows, config.q_size))


class _Layer(NamedTuple):
    """What makes a layer different from others besides its weights."""

    options: AttentionOptions
    rotation: int | None
    """Which of the step's rotations it uses; None leaves queries and keys as they are."""


def _linears(layer: LayerWeights) -> Iterator[Linear]:
    yield from (layer.qkv, layer.attention_output, layer.gate_up, layer.down)


def _norms(layer: LayerWeights) -> Iterator[Tensor]:
    around_attention = (layer.input_norm, layer.qk_norm, layer.post_attention_norm)
    around_feedforward = (layer.pre_feedforward_norm, layer.post_feedforward_norm)
    yield from (norm for norm in (*around_attention, *around_feedforward) if norm is not None)
