"""Reads GGUF files: metadata as a Hugging Face configuration, tensors by their Hugging Face names.

The format and the metadata keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, quants
from torch import Tensor

from sfllm_worker.model.errors import ModelLoadError


@dataclass(frozen=True)
class GgufFamily:
    """What the GGUF conversion of an architecture needs to know."""

    architecture: str
    model_type: str
    permuted: bool = False
    """Whether rows of the query and key weights are stored pairwise interleaved for rotation."""


FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily("LlamaForCausalLM", "llama", permuted=True),
    "qwen3": GgufFamily("Qwen3ForCausalLM", "qwen3"),
}

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
_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass
class GgufFile:
    """An open GGUF file of a supported architecture. Raises `ModelLoadError` for any other."""

    path: Path
    family: GgufFamily = field(init=False)
    metadata: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Read the metadata; tensors stay on disk until asked for."""
        try:
            reader = GGUFReader(self.path)
            self.metadata = {name: value.contents() for name, value in reader.fields.items()}
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ModelLoadError(f"{self.path} is not a readable GGUF file: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        name = str(self.metadata.get("general.architecture"))
        if name not in FAMILIES:
            raise ModelLoadError(
                f"{self.path}: unsupported GGUF architecture: {name} (supported: {', '.join(FAMILIES)})"
            )
        self.family = FAMILIES[name]
        self._prefix = name

    def config(self) -> dict[str, Any]:
        """The contents of the `config.json` that the metadata stands for."""
        heads = self._integer("attention.head_count")
        hidden = self._integer("embedding_length")
        head_dim = self._integer("attention.key_length", hidden // max(heads, 1))
        if self._integer("rope.dimension_count", head_dim) != head_dim:
            raise ModelLoadError(f"{self.path}: unsupported option: rotation of a part of the head")
        names = self._tensors.keys()
        return {
            "architectures": [self.family.architecture],
            "model_type": self.family.model_type,
            "vocab_size": self._vocab_size(),
            "hidden_size": hidden,
            "intermediate_size": self._integer("feed_forward_length"),
            "num_hidden_layers": self._integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._integer("context_length"),
            "rope_parameters": self._rope(head_dim),
            "tie_word_embeddings": "output.weight" not in names,
            "attention_bias": "blk.0.attn_q.bias" in names,
            "mlp_bias": "blk.0.ffn_gate.bias" in names,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._eos_token_ids(),
        }

    def tensors(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Every weight as `(Hugging Face name, float32 tensor)`, de-quantized one at a time.

        Raises `ModelLoadError` for tensors that the architecture does not have.
        """
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        for name, stored in self._tensors.items():
            if name == _ROPE_FACTORS:
                continue  # part of the configuration, see _rope
            part = _BLOCK.fullmatch(name)
            target = _hugging_face_name(name)
            if target is None:
                raise ModelLoadError(f"{self.path}: tensor {name} is not known for {self._prefix}")
            values = self._values(stored)
            if self.family.permuted and part is not None and part[2] in heads:
                values = unpermute(values, heads[part[2]])
            yield target, values

    def _values(self, stored: Any) -> Tensor:
        try:
            values = quants.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            kind = stored.tensor_type.name
            raise ModelLoadError(f"{self.path}: tensor {stored.name} has unsupported type {kind}") from error
        return torch.from_numpy(np.require(values, dtype=np.float32, requirements=["C", "W"]))

    def _vocab_size(self) -> int:
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise ModelLoadError(f"{self.path}: tensor token_embd.weight is missing")
        return int(embedding.shape[1])

    def _eos_token_ids(self) -> list[int]:
        """The end of text, and the end of turn where a file names both."""
        keys = ("eos_token_id", "eot_token_id")
        ids = [self.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
        return list(dict.fromkeys(value for value in ids if isinstance(value, int)))

    def _rope(self, head_dim: int) -> dict[str, Any]:
        theta = self._number("rope.freq_base", 10000.0)
        kind = self.metadata.get(f"{self._prefix}.rope.scaling.type", "none")
        if _ROPE_FACTORS in self._tensors:
            return {"rope_theta": theta, **self._llama3_rope(theta, head_dim)}
        if kind == "linear":
            factor = self._number("rope.scaling.factor")
            return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        if kind != "none":
            raise ModelLoadError(f"{self.path}: unsupported rope scaling: {kind}")
        return {"rope_type": "default", "rope_theta": theta}

    def _llama3_rope(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Parameters of Llama 3's scaling, which GGUF stores as its result: a divisor per frequency.

        The largest divisor is the factor; the other parameters are those of every published Llama 3,
        checked by computing the divisors again.
        """
        stored = self._values(self._tensors[_ROPE_FACTORS]).to(torch.float64)
        factor, low, high, original = float(stored.max()), 1.0, 4.0, 8192
        frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        ramp = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        expected = 1 / ((1 - ramp) / factor + ramp)
        if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=1e-3):
            raise ModelLoadError(f"{self.path}: {_ROPE_FACTORS} is not the scaling of Llama 3")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(f"{self._prefix}.{key}", default)
        if not isinstance(value, int):
            raise ModelLoadError(f"{self.path}: {self._prefix}.{key} must be one integer, not {value!r}")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"{self._prefix}.{key}", default)
        if not isinstance(value, (int, float)):
            raise ModelLoadError(f"{self.path}: {self._prefix}.{key} must be a number, not {value!r}")
        # Metadata is float32; the shortest decimal that rounds to it is the number that was meant.
        return float(str(np.float32(value)))


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo the interleaving of rows with which GGUF stores Llama's query and key weights (or biases).

    A head's rows there go (0, half, 1, half + 1, ...), since llama.cpp rotates neighbouring channels;
    this decoder rotates channel i with channel i + half.
    """
    half = weight.shape[0] // heads // 2
    return weight.view(heads, half, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _hugging_face_name(name: str) -> str | None:
    part = _BLOCK.fullmatch(name)
    if part is None:
        return _GLOBAL_NAMES.get(name)
    index, kind, suffix = part.groups()
    target = _BLOCK_NAMES.get(kind)
    return None if target is None else f"model.layers.{index}.{target}.{suffix}"
