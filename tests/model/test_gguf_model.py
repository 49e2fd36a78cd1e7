"""Models written as GGUF the way llama.cpp stores them, read back and compared with transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from model_references import LLAMA3_ROPE, VARIANTS, Sequences, make_reference, reference_logits
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sfllm_worker.load import ModelLoadError, load_model

PUBLISHED_ROPE = {
    **LLAMA3_ROPE,
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
