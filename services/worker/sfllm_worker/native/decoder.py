"""A decoder whose steps run in the native library: one call for all layers of a step."""

from __future__ import annotations

import ctypes
import weakref
from ctypes import byref
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sfllm_worker import large_pages
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.decoder import Decoder, DecoderWeights, LayerWeights
from sfllm_worker.model.layers import Embedding, Linear, soft_cap
from sfllm_worker.model.rope import Rotary
from sfllm_worker.native import structures as s
from sfllm_worker.native.attention import ELEMENT_TYPES, batch_spec
from sfllm_worker.native.library import check
from sfllm_worker.native.packing import Packing
from sfllm_worker.native.panels import PanelEmbedding, PanelLinear
from sfllm_worker.native.quantized_panels import QuantizedPanelLinear
from sfllm_worker.native.unpacked import keep_unpacked

_ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2}
_FIRST_TABLE_ROWS = 2048


class NativeDecoder(Decoder):
    """`Decoder` in one native call a step, over the same weights.

    Hidden rows stay in float32 between products, and each row is computed in an order that does not depend
    on the batch: a sequence's logits are the same to the last bit alone and in any batch, decoded, in
    chunks or computed again.
    """

    def __init__(self, config: ModelConfig, weights: DecoderWeights, library: ctypes.CDLL) -> None:
        super().__init__(config, _packed(config, weights, library))
        self._library = library
        self._element_type = ELEMENT_TYPES[self.dtype]
        linears = _all_linears(self.weights)
        dense = sum(linear.unpacked_bytes for linear in linears if isinstance(linear, PanelLinear))
        quantized = [linear for linear in linears if isinstance(linear, QuantizedPanelLinear)]
        self.unpacked_bytes = dense + keep_unpacked(quantized, library)
        """Memory that unpacked copies of quantized or compressed weights take beside them."""
        self._tables = [_RotationTable(rotary) for rotary in self._rotaries]
        self._rotations = (s.RotationSpec * max(1, len(self._tables)))()
        # The structures hold bare addresses: these tensors must live as long.
        self._kept: list[Tensor] = []
        self._model = self._model_spec()
        self._embedding = _embedding_matrix(self.weights.embedding)
        self._head = _matrix(self.weights.head)
        self._kv: KVCache | None = None
        # A thread that helped with a step may be slow to let go of what it read.
        weakref.finalize(self, library.sfllm_wait_for_helpers)
        self._memory = _WorkingMemory(0, torch.empty(0), torch.empty(0), torch.empty(0))
        self._logits = torch.empty(0, config.vocab_size)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        kv: KVCache,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run one step and write its keys and values into `kv`; see `Decoder.forward`."""
        tokens = batch.num_tokens
        memory = self._working_memory(tokens)
        self._embed(token_ids, memory.hidden)
        longest = max(batch.context_lens)
        for index, table in enumerate(self._tables):
            self._rotations[index] = table.covering(longest)
        if rows is None:
            rows = torch.arange(tokens)
        result = torch.empty(len(rows), self.config.hidden_size, dtype=self.dtype)
        step = batch_spec(batch)
        step.threads = torch.get_num_threads()
        step.positions = positions.data_ptr()
        step.wanted, step.num_wanted = rows.data_ptr(), len(rows)
        step.rotations, step.result = self._rotations, result.data_ptr()
        step.hidden, step.added = memory.hidden.data_ptr(), memory.added.data_ptr()
        step.narrow = memory.narrow.data_ptr()
        self._keep(kv)
        cache = s.KVSpec(kv.storage.data_ptr(), kv.num_blocks, kv.block_size)
        check(self._library.sfllm_decoder_step(byref(self._model), byref(cache), byref(step)))
        return result

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Logits float32 `[n, vocab_size]` of the given rows `[n, hidden_size]`; see `Decoder.logits`."""
        rows = hidden_rows.contiguous()
        count, size = len(rows), self.config.vocab_size
        if len(self._logits) < count:
            # Used again and again: the kernel would have to find and clear megabytes for every step.
            self._logits = large_pages.zeros((count, size), torch.float32)
        out = self._logits[:count]
        if count:
            arguments = (rows.data_ptr(), count, size, out.data_ptr(), torch.get_num_threads())
            check(self._library.sfllm_linear(self._element_type, byref(self._head), *arguments))
        if self.config.final_soft_cap is not None:
            out = soft_cap(out, self.config.final_soft_cap)
        return out

    def _embed(self, token_ids: Tensor, hidden: Tensor) -> None:
        """Begin with the tokens' rows. Raises IndexError for ids outside of the vocabulary."""
        size, scale = self.config.vocab_size, self._embedding_scale
        tokens = (token_ids.data_ptr(), len(token_ids), 1.0 if scale is None else scale)
        arguments = (byref(self._embedding), size, *tokens, hidden.data_ptr(), torch.get_num_threads())
        if self._library.sfllm_embed(self._element_type, *arguments):
            raise IndexError(f"token ids must be within 0 .. {size - 1}")

    def _keep(self, kv: KVCache) -> None:
        if kv is not self._kv:
            self._library.sfllm_wait_for_helpers()
            self._kv = kv

    def _working_memory(self, tokens: int) -> _WorkingMemory:
        """Buffers for a step of so many tokens; they grow to the largest step and are used again."""
        if self._memory.tokens < tokens:
            c = self.config
            narrow = c.hidden_size + max(c.intermediate_size, 2 * c.q_size)
            self._memory = _WorkingMemory(
                tokens,
                torch.empty(tokens, c.hidden_size, dtype=torch.float32),
                torch.empty(tokens, c.hidden_size, dtype=torch.float32),
                torch.empty(tokens, narrow, dtype=self.dtype),
            )
        return self._memory

    def _model_spec(self) -> s.ModelSpec:
        c, weights = self.config, self.weights
        layers = (s.LayerSpec * c.num_layers)(*map(self._layer_spec, range(c.num_layers)))
        return s.ModelSpec(
            element_type=self._element_type,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            heads=c.num_heads,
            kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            num_layers=c.num_layers,
            activation=_ACTIVATIONS[c.activation],
            norm_eps=c.rms_norm_eps,
            attention_scale=c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
            attention_soft_cap=c.attention_soft_cap or 0.0,
            final_norm=self._norm(weights.final_norm),
            layers=layers,
        )

    def _layer_spec(self, index: int) -> s.LayerSpec:
        layer: LayerWeights = self.weights.layers[index]
        kind = self._layers[index]
        return s.LayerSpec(
            qkv=_matrix(layer.qkv),
            output=_matrix(layer.attention_output),
            gate_up=_matrix(layer.gate_up),
            down=_matrix(layer.down),
            input_norm=self._norm(layer.input_norm),
            qk_norm=self._norm(layer.qk_norm),
            post_attention_norm=self._norm(layer.post_attention_norm),
            pre_feedforward_norm=self._norm(layer.pre_feedforward_norm),
            post_feedforward_norm=self._norm(layer.post_feedforward_norm),
            rotation=-1 if kind.rotation is None else kind.rotation,
            window=kind.options.window or 0,
        )

    def _norm(self, weight: Tensor | None) -> int | None:
        """The address of a norm's weight in float32."""
        if weight is None:
            return None
        self._kept.append(weight.to(torch.float32).contiguous())
        return self._kept[-1].data_ptr()


class _WorkingMemory(NamedTuple):
    """See `StepSpec` in `src/step.h`."""

    tokens: int
    hidden: Tensor
    added: Tensor
    narrow: Tensor


class _RotationTable:
    """A rotary embedding's cosines and sines by position, as far as sequences have come."""

    def __init__(self, rotary: Rotary) -> None:
        self._rotary = rotary
        self._length = 0
        self._spec = s.RotationSpec()

    def covering(self, length: int) -> s.RotationSpec:
        """A table of at least so many positions; it is valid until a longer one is asked for."""
        if length > self._length:
            self._length = count = max(_FIRST_TABLE_ROWS, length, 2 * self._length)
            cosines, signed = self._rotary.rotation(torch.arange(count), torch.float32)
            half = self._rotary.dim // 2
            self._rows = torch.cat((cosines[:, 0, :half], signed[:, 0, half:]), dim=1)
            """float32 `[length, channels]`: cosines, then sines, of each position."""
            self._spec = s.RotationSpec(self._rows.data_ptr(), self._rows.shape[1])
        return self._spec


def _packed(config: ModelConfig, weights: DecoderWeights, library: ctypes.CDLL) -> DecoderWeights:
    """The same weights as native products read them, in the order in which a step does."""
    packing = Packing(library, _all_linears(weights), weights.embedding.dtype)
    layers = tuple(
        replace(
            layer,
            qkv=packing.pack(layer.qkv, config.head_dim),
            attention_output=packing.pack(layer.attention_output, config.hidden_size),
            gate_up=packing.pack(layer.gate_up, config.intermediate_size),
            down=packing.pack(layer.down, config.hidden_size),
        )
        for layer in weights.layers
    )
    head = packing.pack(weights.head, config.vocab_size)
    embedding = PanelEmbedding(head) if config.tie_word_embeddings else weights.embedding
    return replace(weights, embedding=embedding, layers=layers, head=head)


def _all_linears(weights: DecoderWeights) -> list[Linear]:
    """In the order in which a step reads them."""
    layers = [(w.qkv, w.attention_output, w.gate_up, w.down) for w in weights.layers]
    return [linear for layer in layers for linear in layer] + [weights.head]


def _matrix(linear: Linear) -> s.Matrix:
    assert isinstance(linear, PanelLinear | QuantizedPanelLinear)
    return linear.matrix()


def _embedding_matrix(embedding: Tensor | Embedding) -> s.Matrix:
    if isinstance(embedding, PanelEmbedding):
        return embedding.matrix()
    assert isinstance(embedding, Tensor)
    return s.Matrix(embedding.data_ptr(), None, *embedding.shape, s.PLAIN_ROWS)
