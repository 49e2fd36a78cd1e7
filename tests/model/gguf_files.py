"""Writes models of transformers as GGUF files, the way llama.cpp stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor

from sfllm_worker.load.dummy import byte_tokenizer

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PERMUTED = ("llama", "smollm3")
"""Architectures whose queries and keys llama.cpp rotates in neighbouring pairs."""


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """A head's rows 0..d-1 stored as 0, d/2, 1, d/2 + 1, ..."""
    dim = weight.shape[0] // heads
    order = [row for i in range(dim // 2) for row in (i, i + dim // 2)]
    return torch.cat([weight[head * dim : (head + 1) * dim][order] for head in range(heads)])


def gguf_name(name: str, arch: str) -> str:
    names = GEMMA_NAMES if arch.startswith("gemma") else NAMES
    stem, suffix = name.rsplit(".", 1)
    if stem in names:
        return f"{names[stem]}.{suffix}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{names[rest]}.{suffix}"


def stored(name: str, tensor: Tensor, arch: str, config: Any) -> Tensor:
    """A parameter as the converter of llama.cpp writes it."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    if arch in PERMUTED and part in heads:
        return interleaved(tensor, heads[part])
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


def write_gguf(
    model: Any,
    arch: str,
    path: Path,
    extra: dict[str, Tensor] | None = None,
    chat_template: str | None = None,
) -> None:
    config = model.config
    writer = GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if arch != "phi3":
        writer.add_key_length(head_dim)
    if getattr(config, "sliding_window", None) and arch != "llama":
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    tensors = write_rope(writer, arch, config, head_dim) | (extra or {})
    write_vocabulary(writer, config.vocab_size)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for name, parameter in model.named_parameters():
        tensor = stored(name, parameter.detach(), arch, config)
        writer.add_tensor(gguf_name(name, arch), tensor.numpy())
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_rope(writer: GGUFWriter, arch: str, config: Any, head_dim: int) -> dict[str, Tensor]:
    """Write the metadata of the rotary embedding; returns the tensors that belong to it."""
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    original = rope.get("original_max_position_embeddings")
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if rope["rope_type"] != "longrope":
        return {}
    ratio = torch.tensor(config.max_position_embeddings / original)
    writer.add_rope_scaling_attn_factors(float((1 + ratio.log() / torch.tensor(original).log()).sqrt()))
    return {
        f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"])
        for length in ("long", "short")
    }


def write_vocabulary(writer: GGUFWriter, size: int) -> None:
    vocabulary = byte_tokenizer(size).get_vocab()
    words = sorted(vocabulary, key=lambda token: vocabulary[token])
    words[259:261] = ["ab", "abc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3 if 256 <= i < 259 else 1 for i in range(size)])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(256)
