"""The shortest time that a workload can take on a machine: what it must compute and what it must read.

Prompts cost their multiplications at the machine's peak. Decoding takes at least as many steps as the
longest answer, or as all answers through as many places as are open at once; each step reads all
weights, and each token its own keys and values. A server cannot be faster without computing less.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BYTES_PER_WEIGHT = {"bf16": 2.0, "int8": 1.0, "Q4_1": 0.625, "int4": 0.5625}
_CACHE_BYTES = 2


class Machine(NamedTuple):
    """What all cores reach together: bytes read a second, and bfloat16 operations a second."""

    read_bytes: float
    operations: float


class ModelSize(NamedTuple):
    """The sizes of a dense decoder that the floor depends on."""

    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @classmethod
    def read(cls, directory: Path) -> ModelSize:
        """From a Hugging Face directory."""
        config = json.loads((directory / "config.json").read_text())
        names = (
            *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "intermediate_size", "vocab_size"),
        )
        return cls(*(int(config[name]) for name in names))

    @property
    def layer_weights(self) -> int:
        """Weights of all layers."""
        attention = self.hidden * self.head_dim * (2 * self.query_heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def weights(self) -> int:
        """Weights that one step reads: the layers and the output head."""
        return self.layer_weights + self.hidden * self.vocabulary

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _CACHE_BYTES


class Size(NamedTuple):
    """One request: its prompt, how much of it another request computes, its answer; in tokens."""

    prompt: int
    shared: int
    output: int


def floor_seconds(
    machine: Machine, model: ModelSize, precision: str, requests: Sequence[Size], at_once: int
) -> float:
    """The least time for `requests` with at most `at_once` open."""
    shared = max((size.shared for size in requests), default=0)
    computed = shared + sum(size.prompt - size.shared for size in requests)
    prefill = 2 * model.layer_weights * computed + sum(_attention(model, size) for size in requests)
    # The first token of an answer comes out of the prefill.
    decoded = sum(size.output - 1 for size in requests)
    steps = max(max((size.output - 1 for size in requests), default=0), -(-decoded // at_once))
    cached = sum(_cached_tokens_read(size) for size in requests)
    read = steps * model.weights * BYTES_PER_WEIGHT[precision] + cached * model.cache_bytes_per_token
    multiplied = 2 * model.weights * decoded
    return prefill / machine.operations + max(read / machine.read_bytes, multiplied / machine.operations)


def _attention(model: ModelSize, size: Size) -> int:
    """Operations of causal attention over the part of the prompt that is not shared."""
    pairs = (size.prompt**2 - size.shared**2) // 2
    return 4 * model.layers * model.query_heads * model.head_dim * pairs


def _cached_tokens_read(size: Size) -> int:
    steps = size.output - 1
    return steps * size.prompt + steps * (steps + 1) // 2
