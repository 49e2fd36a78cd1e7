"""The attention function that models of transformers call, and what receives its calls."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sfllm_worker.kv.cache import KVCache
from sfllm_worker.model.attention import AttentionOptions, AttentionStep
from sfllm_worker.model.errors import ModelLoadError


class _Call(Protocol):
    """Receives the attention calls of one forward pass, layer by layer."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """Attend with `[num_tokens, heads, head_dim]`; returns the shape of `q`."""
        ...


_current: ContextVar[_Call] = ContextVar("sfllm_paged_call")


@dataclass
class PagedCall:
    """Attends over the paged cache; the calls of a pass come in the order of the layers."""

    step: AttentionStep
    kv: KVCache
    layer: int = 0
    """How many layers have attended."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """Store the layer's keys and values, then attend."""
        layer = self.kv.layers[self.layer]
        self.layer += 1
        self.step.write_kv(layer, k, v)
        return self.step.attend(layer, q.contiguous(), options)


@dataclass
class Probe:
    """Notes what each layer asks for instead of computing it."""

    shapes: list[tuple[torch.Size, torch.Size, torch.Size]] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """Note the shapes and the window; the result only has the right shape."""
        self.shapes.append((q.shape, k.shape, v.shape))
        self.windows.append(options.window)
        return q


_HARMLESS = frozenset(
    {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"}
    | {"output_hidden_states", "output_router_logits", "position_embeddings", "deterministic"}
)
"""Arguments of transformers' attention functions that change nothing here."""


def paged_attention(
    _module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The registered function: `query`, `key`, `value` are `[1, heads, num_tokens, head_dim]`."""
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if unknown or attention_mask is not None or others.get("is_causal") is False:
        raise ModelLoadError(f"unsupported attention option: {', '.join(unknown) or 'a mask of its own'}")
    options = AttentionOptions(sliding_window, softcap, scaling)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _current.get().attend(q, k, v, options)[None], None


def run_body(body: Any, token_ids: Tensor, positions: Tensor, call: _Call) -> Tensor:
    """Run a model without its head on the flat row of a step, `call` attending; `[num_tokens, hidden]`."""
    token = _current.set(call)
    try:
        output = body(input_ids=token_ids[None], position_ids=positions[None], use_cache=False)
    finally:
        _current.reset(token)
    hidden: Tensor = output.last_hidden_state
    return hidden[0]
