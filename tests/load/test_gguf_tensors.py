"""Every quantization of GGUF that is supported, against transformers' own unpacking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from transformers.integrations.gguf.dequant import dequantize

from sfllm_worker.load import ModelLoadError, load_model
from sfllm_worker.load.gguf import GgufFile

SHAPE = (32, 512)
PLAIN = ("F32", "F16", "BF16")
QUANTIZED = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
FIVE_BITS = ("Q5_0", "Q5_1")
"""Kinds that transformers cannot unpack: compared with the values that were packed."""
SCALE_BYTES = {"Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)}
"""Where a block keeps its float16 scales, for the kinds that the library can read but not write."""


def original_values() -> np.ndarray[Any, Any]:
    return np.random.default_rng(5).normal(size=SHAPE).astype(np.float32)


def stored_values(name: str) -> np.ndarray[Any, Any]:
    """A tensor's bytes: real quantization where the library has it, else random blocks of sane scale."""
    generator = np.random.default_rng(6)
    kind = GGMLQuantizationType[name]
    if name not in SCALE_BYTES:
        return quants.quantize(original_values(), kind)
    block, size = GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (SHAPE[0] * SHAPE[1] // block, size), dtype=np.uint8)
    start, end = SCALE_BYTES[name]
    scales = generator.uniform(0.01, 0.1, (len(blocks), (end - start) // 2)).astype(np.float16)
    blocks[:, start:end] = scales.view(np.uint8)
    return blocks.reshape(SHAPE[0], -1)


def write(path: Path, values: np.ndarray[Any, Any], name: str, arch: str = "llama") -> None:
    writer = GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(SHAPE[1])
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", values, raw_dtype=GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", [*PLAIN, *QUANTIZED])
def test_a_tensor_is_unpacked_as_transformers_unpacks_it(name: str, tmp_path: Path) -> None:
    values = stored_values(name)
    write(tmp_path / "one.gguf", values, name)
    file = GgufFile(tmp_path / "one.gguf")
    [(target, ours)] = file.tensors(file.config())
    assert target == "model.embed_tokens.weight"
    assert ours.shape == SHAPE
    assert float(ours.std()) > 0.1
    if name == "F32":
        expected = torch.from_numpy(values)
    elif name in PLAIN:
        half = torch.float16 if name == "F16" else torch.bfloat16
        expected = torch.from_numpy(values.view(np.uint8).copy()).view(half).view(SHAPE).float()
    else:
        raw = torch.from_numpy(values.view(np.uint8).copy()).view(SHAPE[0], -1)
        expected = dequantize(raw, int(GGMLQuantizationType[name])).view(SHAPE)
    assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FIVE_BITS)
def test_five_bit_blocks_come_back_to_within_their_rounding(name: str, tmp_path: Path) -> None:
    write(tmp_path / "one.gguf", stored_values(name), name)
    file = GgufFile(tmp_path / "one.gguf")
    [(_, ours)] = file.tensors(file.config())
    # A block's largest value, at most 5 here, is spread over 16 steps on either side of zero.
    assert float((ours - torch.from_numpy(original_values())).abs().max()) < 5 / 16


def test_metadata_becomes_a_configuration_with_the_numbers_that_were_meant(tmp_path: Path) -> None:
    write(tmp_path / "one.gguf", stored_values("F32"), "F32")
    config = GgufFile(tmp_path / "one.gguf").config()
    assert config["rms_norm_eps"] == 1e-5  # stored as float32, which is 9.99999974e-06
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 4
    assert (config["vocab_size"], config["hidden_size"], config["head_dim"]) == (*SHAPE, 128)
    assert config["tie_word_embeddings"] is True


def test_an_architecture_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "one.gguf", stored_values("F32"), "F32", arch="mamba")
    with pytest.raises(ModelLoadError, match=r"mamba \(supported: llama, qwen2, qwen3,"):
        GgufFile(tmp_path / "one.gguf")


@pytest.mark.parametrize("contents", [b"", b"GGUF", b"not a model at all, only some text"])
def test_a_file_that_is_no_gguf_is_refused(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(contents)
    with pytest.raises(ModelLoadError, match=r"broken\.gguf is not a readable GGUF file"):
        GgufFile(tmp_path / "broken.gguf")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "whole.gguf", stored_values("F32"), "F32")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:5000])
    with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
        GgufFile(tmp_path / "cut.gguf")


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"absent\.gguf does not exist"):
        load_model(tmp_path / "absent.gguf")
