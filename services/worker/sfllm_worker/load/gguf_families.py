"""What the GGUF files of each architecture call things, and how they store them otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PHI3_NAMES = {**_BLOCK_NAMES, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_GEMMA_NAMES = {
    **_BLOCK_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")

LLAMA3_DIVISORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (LLAMA3_DIVISORS, LONG_FACTORS, SHORT_FACTORS)
"""Tensors that are part of the configuration rather than weights."""


@dataclass(frozen=True)
class GgufFamily:
    """What the GGUF conversion of an architecture needs to know."""

    architecture: str
    model_type: str
    permuted: bool = False
    """Whether rows of the query and key weights are stored pairwise interleaved for rotation."""
    partial_rotary: bool = False
    gemma: bool = False
    """Whether norm weights are stored with the one added that Gemma's checkpoints leave out."""
    block_names: Mapping[str, str] | None = None
    sharper_layers: int = 0
    """The number of layers of the one model whose scores are scaled by hidden_size / num_heads instead of
    head_dim; files do not say it."""

    def tensor_name(self, name: str) -> str | None:
        """The Hugging Face name of a tensor, or None when the architecture has no such tensor."""
        part = _BLOCK.fullmatch(name)
        if part is None:
            return _GLOBAL_NAMES.get(name)
        index, kind, suffix = part.groups()
        target = (self.block_names or _BLOCK_NAMES).get(kind)
        return None if target is None else f"model.layers.{index}.{target}.{suffix}"


FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily("LlamaForCausalLM", "llama", permuted=True),
    "qwen2": GgufFamily("Qwen2ForCausalLM", "qwen2"),
    "qwen3": GgufFamily("Qwen3ForCausalLM", "qwen3"),
    "phi3": GgufFamily("Phi3ForCausalLM", "phi3", partial_rotary=True, block_names=_PHI3_NAMES),
    "smollm3": GgufFamily("SmolLM3ForCausalLM", "smollm3", permuted=True),
    "gemma2": GgufFamily(
        "Gemma2ForCausalLM", "gemma2", gemma=True, block_names=_GEMMA_NAMES, sharper_layers=46
    ),
    "gemma3": GgufFamily(
        "Gemma3ForCausalLM", "gemma3_text", gemma=True, block_names=_GEMMA_NAMES, sharper_layers=62
    ),
}
"""By `general.architecture`. Mistral's files are of the architecture llama, and have no sliding window."""
