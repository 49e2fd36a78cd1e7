"""One decoder for all supported families, configured by `ModelConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch import Tensor

from sfllm_worker.kv.cache import KVCache, KVLayer
from sfllm_worker.model.attention import AttentionBackend, AttentionBatch, AttentionStep, TorchAttention
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.layers import Linear, rms_norm, silu_and_mul
from sfllm_worker.model.rope import apply_rotation, inverse_frequencies, rotation


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one decoder layer; query, key and value are one product, so are gate and up."""

    input_norm: Tensor
    """`[hidden_size]`."""
    qkv: Linear
    """hidden_size to q_size + 2 * kv_size."""
    qk_norm: Tensor | None
    """`[num_heads + num_kv_heads, head_dim]`: the query norm's weight per query head, then the key norm's."""
    attention_output: Linear
    post_attention_norm: Tensor
    """`[hidden_size]`."""
    gate_up: Linear
    """hidden_size to 2 * intermediate_size."""
    down: Linear


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a model, on one device and in one dtype."""

    embedding: Tensor
    """`[vocab_size, hidden_size]`."""
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    """`[hidden_size]`."""
    head: Linear
    """hidden_size to vocab_size; shares the embedding's memory when the model ties them."""


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
        self._frequencies = inverse_frequencies(config, self.device)

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
            total += layer.input_norm.nbytes + layer.post_attention_norm.nbytes
            total += layer.qk_norm.nbytes if layer.qk_norm is not None else 0
        return total

    def forward(self, token_ids: Tensor, positions: Tensor, batch: AttentionBatch, kv: KVCache) -> Tensor:
        """Run one step and write its keys and values into `kv`.

        `token_ids` and `positions` are int64 `[num_tokens]` in the order of `batch`. Returns the final,
        normed hidden rows `[num_tokens, hidden_size]`.
        """
        step = self.attention.begin(batch)
        rotary = rotation(positions, self._frequencies, self.dtype)
        hidden = F.embedding(token_ids, self.weights.embedding)
        eps = self.config.rms_norm_eps
        for weights, layer in zip(self.weights.layers, kv.layers, strict=True):
            normed = rms_norm(hidden, weights.input_norm, eps)
            hidden += self._attention(weights, layer, step, normed, rotary)
            normed = rms_norm(hidden, weights.post_attention_norm, eps)
            hidden += weights.down(silu_and_mul(weights.gate_up(normed)))
        return rms_norm(hidden, self.weights.final_norm, eps)

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Logits float32 `[n, vocab_size]` of the given rows `[n, hidden_size]` of `forward`'s result."""
        return self.weights.head(hidden_rows).to(torch.float32)

    def _attention(
        self,
        weights: LayerWeights,
        layer: KVLayer,
        step: AttentionStep,
        normed: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        config = self.config
        rows = normed.shape[0]
        heads, rotated = config.num_heads, config.num_heads + config.num_kv_heads
        qkv = weights.qkv(normed).view(rows, rotated + config.num_kv_heads, config.head_dim)
        # Queries and keys are normed and rotated as one tensor: half the operations.
        qk, v = qkv[:, :rotated], qkv[:, rotated:]
        if weights.qk_norm is not None:
            qk = rms_norm(qk, weights.qk_norm, config.rms_norm_eps)
        qk = apply_rotation(qk, *rotary)
        step.write_kv(layer, qk[:, heads:], v)
        attended = step.attend(layer, qk[:, :heads])
        return weights.attention_output(attended.reshape(rows, config.q_size))


def _linears(layer: LayerWeights) -> Iterator[Linear]:
    yield from (layer.qkv, layer.attention_output, layer.gate_up, layer.down)
