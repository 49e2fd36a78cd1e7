"""Writes models of transformers as GGUF files, the way llama.cpp stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
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
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """A head's rows 0..d-1 stored as 0, d/2, 1, d/2 + 1, ..."""
    dim = weight.shape[0] // heads
    order = [row for i in range(dim // 2) for row in (i, i + dim // 2)]
    return torch.cat([weight[head * dim : (head + 1) * dim][order] for head in range(heads)])


def gguf_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    if stem in NAMES:
        return f"{NAMES[stem]}.{suffix}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{suffix}"


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
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    write_vocabulary(writer, config.vocab_size)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:
            tensor = interleaved(tensor, heads[part])
        writer.add_tensor(gguf_name(name), tensor.numpy())
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
