"""Models written as GGUF the way llama.cpp stores them, read back and compared with transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from model_references import LLAMA3_ROPE, VARIANTS, Sequences, make_reference, reference_logits
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sfllm_worker.load import ModelLoadError, load_model
from sfllm_worker.load.dummy import byte_tokenizer

PUBLISHED_ROPE = {
    **LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
}
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


def rope_factors(config: Any) -> Tensor:
    """The divisors that llama.cpp's converter computes for Llama 3's scaling."""
    rope = config.rope_parameters
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / config.head_dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(factors)


def write_gguf(model: Any, arch: str, path: Path, extra: dict[str, Tensor] | None = None) -> None:
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


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "llama-biased", "qwen3", "qwen3-tied"])
def test_a_model_read_from_gguf_has_the_logits_of_the_original(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFLLM_CACHE_DIR", str(tmp_path / "cache"))
    reference = make_reference(variant, tmp_path)
    path = tmp_path / "model.gguf"
    write_gguf(reference, variant.split("-", maxsplit=1)[0], path)
    loaded = load_model(path, dtype="float32")
    assert loaded.name == "model"
    assert loaded.eos_token_ids == (256,)
    ids = list(range(0, 290, 7))
    [ours] = Sequences(loaded.decoder, 1, 64).step([(0, ids)])
    assert float((ours - reference_logits(reference, ids)).abs().max()) <= 1e-4


def scaled_llama() -> Any:
    torch.manual_seed(3)
    options = {**VARIANTS["llama"][2], "head_dim": 16, "max_position_embeddings": 512}
    shape = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(
            **shape,
            **options,
            num_attention_heads=6,
            num_key_value_heads=2,
            initializer_range=0.3,
            rope_parameters=PUBLISHED_ROPE,
        )
    ).eval()


def test_the_scaling_of_llama3_is_recovered_from_its_stored_divisors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFLLM_CACHE_DIR", str(tmp_path / "cache"))
    reference = scaled_llama()
    factors = rope_factors(reference.config)
    assert len(set(factors.tolist())) > 2  # kept, blended and stretched frequencies all occur
    write_gguf(reference, "llama", tmp_path / "scaled.gguf", {"rope_freqs.weight": factors})
    loaded = load_model(tmp_path / "scaled.gguf", dtype="float32")
    ids = list(range(200))
    [ours] = Sequences(loaded.decoder, 1, 200).step([(0, ids)])
    assert float((ours - reference_logits(reference, ids)).abs().max()) <= 1e-4


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rope_freqs.weight": torch.linspace(1, 8, 8)}, "not the scaling of Llama 3"),
        ({"blk.0.ffn_gate_exps.weight": torch.ones(4, 4)}, "blk.0.ffn_gate_exps.weight is not known"),
    ],
)
def test_tensors_that_would_be_misread_are_refused(
    extra: dict[str, Tensor], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFLLM_CACHE_DIR", str(tmp_path / "cache"))
    write_gguf(scaled_llama(), "llama", tmp_path / "odd.gguf", extra)
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path / "odd.gguf")
    assert not list((tmp_path / "cache" / "models").glob("*odd-*tmp*"))
