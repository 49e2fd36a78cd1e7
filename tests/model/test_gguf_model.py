"""Models written as GGUF the way llama.cpp stores them, read back and compared with transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from model_references import Sequences, make_model, reference_logits
from model_variants import GEMMA2, GEMMA3, LLAMA3_ROPE, VARIANTS, Variant, rope
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sfllm_worker.load import ModelLoadError, load_model
from sfllm_worker.load.gguf_families import FAMILIES

PUBLISHED_ROPE = {
    **LLAMA3_ROPE,
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
}


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


# Files do not say what scores are scaled by, so these models scale as the published ones of their size.
PUBLISHED_SCALE = {"query_pre_attn_scalar": 16}
MODELS: dict[str, tuple[str, Variant]] = {
    "llama": ("llama", VARIANTS["llama"]),
    "llama-tied": ("llama", VARIANTS["llama-tied"]),
    "llama-biased": ("llama", VARIANTS["llama-biased"]),
    "mistral": ("llama", VARIANTS["mistral"]),
    "qwen2": ("qwen2", VARIANTS["qwen2"]),
    "qwen2-yarn": ("qwen2", Variant("Qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=32))),
    "qwen3": ("qwen3", VARIANTS["qwen3"]),
    "qwen3-tied": ("qwen3", VARIANTS["qwen3-tied"]),
    "phi3": ("phi3", VARIANTS["phi3"]),
    "phi3-window": ("phi3", VARIANTS["phi3-window"]),
    "phi3-longrope": ("phi3", VARIANTS["phi3-longrope"]),
    "phi3-longrope-short": ("phi3", VARIANTS["phi3-longrope-short"]),
    "smollm3": ("smollm3", VARIANTS["smollm3"]),
    "gemma2": ("gemma2", Variant("Gemma2", {**GEMMA2, **PUBLISHED_SCALE})),
    "gemma2-27b": (
        "gemma2",
        Variant("Gemma2", {**GEMMA2, "query_pre_attn_scalar": 8, "num_hidden_layers": 46}),
    ),
    "gemma3": ("gemma3", Variant("Gemma3Text", {**GEMMA3, **PUBLISHED_SCALE, "num_hidden_layers": 7})),
    "gemma3-linear-rope": (
        "gemma3",
        Variant(
            "Gemma3Text",
            {
                **GEMMA3,
                **PUBLISHED_SCALE,
                "num_hidden_layers": 7,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                },
            },
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_read_from_gguf_has_the_logits_of_the_original(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFLLM_CACHE_DIR", str(tmp_path / "cache"))
    arch, variant = MODELS[name]
    reference = make_model(variant)
    path = tmp_path / "model.gguf"
    write_gguf(reference, arch, path)
    loaded = load_model(path, dtype="float32", context_length=variant.context_length)
    assert loaded.name == "model"
    assert loaded.eos_token_ids == (256,)
    ids = list(range(0, 290, 7))
    [ours] = Sequences(loaded.decoder, 1, 64).step([(0, ids)])
    assert float((ours - reference_logits(reference, ids)).abs().max()) <= 1e-4


def test_every_gguf_architecture_is_compared() -> None:
    assert {arch for arch, _ in MODELS.values()} == set(FAMILIES)


def scaled_llama() -> Any:
    torch.manual_seed(3)
    options = {**VARIANTS["llama"].options, "head_dim": 16, "max_position_embeddings": 512}
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
