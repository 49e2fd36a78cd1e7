"""The decoder of the GPU: eight launches a layer and those of attention, over the weights of `Decoder`."""

from __future__ import annotations

from torch import Tensor

from sfllm_worker.kernels.activation import gated_product
from sfllm_worker.kernels.embedding import embed_norm
from sfllm_worker.kernels.norm import add_norm
from sfllm_worker.kernels.rotary import rotate_and_store, rotation_table
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.model.attention import AttentionBackend, AttentionBatch
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.decoder import Decoder, DecoderWeights
from sfllm_worker.model.layers import some_rows


class TritonDecoder(Decoder):
    """`Decoder` with everything between its products and attention in fused kernels.

    A step asks the device for nothing and takes no decision by the values of a tensor, so that it can be
    captured in a CUDA graph. Nothing checks token ids and positions: ids must be in the vocabulary and
    positions below `context_length`, which the engine sees to.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        attention: AttentionBackend,
        context_length: int | None = None,
    ) -> None:
        """`context_length` is the longest context that will be served, None for all that the model has.

        Cosines and sines of so many positions are kept on the device: `4 * dim` bytes for each and each
        kind of rotation.
        """
        super().__init__(config, weights, attention)
        length = min(context_length or config.max_context_length, config.max_context_length)
        self._tables = [rotation_table(rotary, length, self.device) for rotary in self._rotaries]
        # Each addition is fused with the norm after it: of the next layer, or the final one.
        self._next_norms = (*(layer.input_norm for layer in weights.layers[1:]), weights.final_norm)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        kv: KVCache,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run one step and write its keys and values into `kv`; see `Decoder.forward`."""
        config, eps = self.config, self.config.rms_norm_eps
        step = self.attention.begin(batch)
        hidden, normed = self._embedded(token_ids)
        count = len(hidden)
        product = hidden.new_empty(count, config.intermediate_size)
        kinds = zip(self.weights.layers, self._layers, kv.layers, self._next_norms, strict=True)
        for weights, kind, layer, next_norm in kinds:
            qkv = weights.qkv(normed)
            table = None if kind.rotation is None else self._tables[kind.rotation]
            rotate_and_store(
                qkv, layer, batch.slot_mapping, positions, config.num_heads, table, weights.qk_norm, eps
            )
            queries = qkv.view(count, -1, config.head_dim)[:, : config.num_heads]
            attended = step.attend(layer, queries, kind.options).reshape(count, config.q_size)
            added = weights.attention_output(attended)
            add_norm(hidden, weights.pre_feedforward_norm, eps, added, weights.post_attention_norm, normed)
            gated_product(weights.gate_up(normed), config.activation, product)
            added = weights.down(product)
            add_norm(hidden, next_norm, eps, added, weights.post_feedforward_norm, normed)
        return some_rows(normed, rows)

    def _embedded(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The first hidden rows, and the first layer's norm of them."""
        embedding, norm = self.weights.embedding, self.weights.layers[0].input_norm
        eps = self.config.rms_norm_eps
        if isinstance(embedding, Tensor):
            return embed_norm(token_ids, embedding, self._embedding_scale, norm, eps)
        hidden = embedding(token_ids)
        if self._embedding_scale is not None:
            hidden *= self._embedding_scale
        return hidden, add_norm(hidden, norm, eps)
