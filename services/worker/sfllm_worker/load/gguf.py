"""Reads GGUF files: metadata as a Hugging Face configuration, tensors by their Hugging Face names.

The format and the metadata keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, quants
from torch import Tensor

from sfllm_worker.load.gguf_blocks import FINER_THAN_FOUR_BITS, unpack_blocks
from sfllm_worker.load.gguf_families import (
    FAMILIES,
    LLAMA3_DIVISORS,
    LONG_FACTORS,
    ROPE_TENSORS,
    SHORT_FACTORS,
    GgufFamily,
)
from sfllm_worker.model.errors import ModelLoadError
from sfllm_worker.quant.policy import bits_of
from sfllm_worker.quant.quantize import quantize
from sfllm_worker.quant.weight import QuantizedWeight

_POOLING = {0: "", 1: "mean", 3: "last"}
"""By what llama.cpp calls the `pooling_type`."""


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

    def pooling(self) -> str:
        """How embeddings are made of hidden rows (`Pooling.kind`), empty for a model that makes none.

        Raises `ModelLoadError` for one that pools in another way.
        """
        kind = self.metadata.get(f"{self._prefix}.pooling_type", 0)
        if kind not in _POOLING:
            raise ModelLoadError(f"{self.path}: embeddings with pooling_type {kind} are not supported")
        return _POOLING[kind]

    def config(self) -> dict[str, Any]:
        """The contents of the `config.json` that the metadata stands for."""
        heads = self._integer("attention.head_count")
        hidden = self._integer("embedding_length")
        head_dim = self._integer("attention.key_length", hidden // max(heads, 1))
        rotated = self._integer("rope.dimension_count", head_dim)
        if rotated != head_dim and not self.family.partial_rotary:
            raise ModelLoadError(f"{self.path}: unsupported option: rotation of a part of the head")
        names = self._tensors.keys()
        config = {
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
            "rope_parameters": self._rope(head_dim, rotated),
            "tie_word_embeddings": "output.weight" not in names,
            "attention_bias": "blk.0.attn_q.bias" in names,
            "mlp_bias": "blk.0.ffn_gate.bias" in names,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._eos_token_ids(),
        }
        if self.family.partial_rotary:
            config |= self._phi3()
        if self.family.gemma:
            config |= self._gemma(config)
        return config

    def tensors(
        self, config: Mapping[str, Any], bits: int | None = None
    ) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """Every weight as `(Hugging Face name, float32 tensor)`, de-quantized one at a time.

        With `bits`, the weights that `bits_of` names are quantized. Those that the file has in a form that
        can be held exactly stay as they are, and no others lose more than they have to: types of five and
        more bits get eight. Raises `ModelLoadError` for tensors that the architecture does not have.
        """
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        for name, stored in self._tensors.items():
            if name in ROPE_TENSORS:
                continue  # part of the configuration, see _rope
            target = self.family.tensor_name(name)
            if target is None:
                raise ModelLoadError(f"{self.path}: tensor {name} is not known for {self._prefix}")
            values = self._weight(stored, bits_of(target, bits, tied=config["tie_word_embeddings"]))
            module = target.split(".")[-2]
            if self.family.permuted and module in heads:
                values = unpermute_weight(values, heads[module])
            if self.family.gemma and target.endswith("norm.weight") and isinstance(values, Tensor):
                values -= 1
            yield target, values

    def _weight(self, stored: Any, bits: int | None) -> Tensor | QuantizedWeight:
        if bits is None:
            return self._values(stored)
        exact = unpack_blocks(stored.data, stored.tensor_type)
        if exact is not None:
            return exact
        try:
            return quantize(self._values(stored), 8 if stored.tensor_type in FINER_THAN_FOUR_BITS else bits)
        except ValueError as error:
            raise ModelLoadError(f"{self.path}: tensor {stored.name} cannot be quantized: {error}") from error

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

    def _phi3(self) -> dict[str, Any]:
        original = self._integer("rope.scaling.original_context_length", self._integer("context_length"))
        # Zero stands for no window.
        window = self._integer("attention.sliding_window", 0) or None
        return {"original_max_position_embeddings": original, "sliding_window": window}

    def _gemma(self, config: Mapping[str, Any]) -> dict[str, Any]:
        sharper = config["num_hidden_layers"] == self.family.sharper_layers
        scalar = config["hidden_size"] // config["num_attention_heads"] if sharper else config["head_dim"]
        caps = {
            f"{name}_softcapping": self._number(f"{name}_softcapping", 0.0) or None
            for name in ("attn_logit", "final_logit")
        }
        window = self._integer("attention.sliding_window")
        options = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scalar}
        return {**options, **caps, "sliding_window": window}

    def _rope(self, head_dim: int, rotated: int) -> dict[str, Any]:
        theta = self._number("rope.freq_base", 10000.0)
        scaled = {"rope_theta": theta, **self._scaling(theta, head_dim)}
        if rotated != head_dim:
            scaled["partial_rotary_factor"] = rotated / head_dim
        if self._prefix != "gemma3":
            return scaled
        local = self._number("rope.freq_base_swa", 10000.0)
        return {"full_attention": scaled, "sliding_attention": {"rope_type": "default", "rope_theta": local}}

    def _scaling(self, theta: float, head_dim: int) -> dict[str, Any]:
        kind = self.metadata.get(f"{self._prefix}.rope.scaling.type", "none")
        if LLAMA3_DIVISORS in self._tensors:
            return self._llama3_rope(theta, head_dim)
        if LONG_FACTORS in self._tensors:
            return self._longrope()
        if kind == "none":
            return {"rope_type": "default"}
        if kind not in ("linear", "yarn"):
            raise ModelLoadError(f"{self.path}: unsupported rope scaling: {kind}")
        options = {"rope_type": kind, "factor": self._number("rope.scaling.factor")}
        if kind == "yarn":
            original = self._integer("rope.scaling.original_context_length", self._integer("context_length"))
            options["original_max_position_embeddings"] = original
        return options

    def _longrope(self) -> dict[str, Any]:
        if SHORT_FACTORS not in self._tensors:
            raise ModelLoadError(f"{self.path}: tensor {SHORT_FACTORS} is missing")
        options: dict[str, Any] = {"rope_type": "longrope"}
        for key, name in (("long_factor", LONG_FACTORS), ("short_factor", SHORT_FACTORS)):
            options[key] = self._values(self._tensors[name]).tolist()
        if f"{self._prefix}.rope.scaling.attn_factor" in self.metadata:
            options["attention_factor"] = self._number("rope.scaling.attn_factor")
        return options

    def _llama3_rope(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Parameters of Llama 3's scaling, which GGUF stores as its result: a divisor per frequency.

        The largest divisor is the factor; the other parameters are those of every published Llama 3,
        checked by computing the divisors again.
        """
        stored = self._values(self._tensors[LLAMA3_DIVISORS]).to(torch.float64)
        factor, low, high, original = float(stored.max()), 1.0, 4.0, 8192
        frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        ramp = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        expected = 1 / ((1 - ramp) / factor + ramp)
        if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=1e-3):
            raise ModelLoadError(f"{self.path}: {LLAMA3_DIVISORS} is not the scaling of Llama 3")
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


def unpermute_weight(weight: Tensor | QuantizedWeight, heads: int) -> Tensor | QuantizedWeight:
    """`unpermute` for either kind of weight: only rows change places, so that groups of columns stay."""
    if isinstance(weight, QuantizedWeight):
        return weight.map_rows(lambda tensor: unpermute(tensor, heads))
    return unpermute(weight, heads)


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo the interleaving of rows with which GGUF stores Llama's query and key weights (or biases).

    A head's rows there go (0, half, 1, half + 1, ...), since llama.cpp rotates neighbouring channels;
    this decoder rotates channel i with channel i + half.
    """
    half = weight.shape[0] // heads // 2
    return weight.view(heads, half, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
