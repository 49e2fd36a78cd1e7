"""The shortest time that a workload can take on a machine: what it must read and what it must multiply.

The bound holds for any server that computes with these weights: it may read and multiply at the same
time, and it may prefill one prompt in the steps that decode others. One request alone can do neither
across its own phases, since its first token comes before its second. docs/benchmarking.md has the formula.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BYTES_PER_WEIGHT = {
    "bf16": (2.0, 2.0),
    "int8": (1.0, 1.0),
    "int4": (0.5625, 1.0),
    "Q8_0": (1.0625, 1.0625),
    "Q4_0": (0.5625, 1.0625),
    "Q4_1": (0.625, 1.0625),
}
"""Of a weight in the layers, and of one in the output head, with the scales that it shares."""

_CACHE_BYTES = 2


class Machine(NamedTuple):
    """What all cores reach together: bytes read a second, and operations a second in both number formats."""

    read_bytes: float
    operations: float
    int8_operations: float

    def fastest(self, precision: str) -> float:
        """Operations a second for weights of that precision: quantized ones may be multiplied as integers."""
        return self.operations if precision == "bf16" else max(self.operations, self.int8_operations)


class ModelSize(NamedTuple):
    """The sizes of a dense decoder that the bound depends on."""

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

    def weight_bytes(self, precision: str) -> float:
        """What one step reads of them."""
        layers, head = BYTES_PER_WEIGHT[precision]
        return self.layer_weights * layers + self.hidden * self.vocabulary * head

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _CACHE_BYTES


class Size(NamedTuple):
    """One request: its prompt, how much of it another request computes, its answer; in tokens."""

    prompt: int
    shared: int
    output: int

    @property
    def steps(self) -> int:
        """Decode steps: the first token of an answer comes out of the prefill."""
        return self.output - 1


def floor_seconds(
    machine: Machine, model: ModelSize, precision: str, requests: Sequence[Size], at_once: int
) -> float:
    """The least time for `requests` with at most `at_once` open."""
    if not requests:
        return 0.0
    weight_bytes = model.weight_bytes(precision)
    operations = machine.fastest(precision)

    def alone(size: Size) -> float:
        """Its prefill, at least one reading of the weights, and then its steps one by one."""
        read = size.steps * weight_bytes + _own_cache_bytes(model, size)
        multiplied = 2 * model.weights * size.steps
        prefill = max(_prefill_operations(model, size) / operations, weight_bytes / machine.read_bytes)
        return prefill + max(read / machine.read_bytes, multiplied / operations)

    alone_seconds = [alone(size) for size in requests]
    if at_once == 1:
        return sum(alone_seconds)
    decoded = sum(size.steps for size in requests)
    steps = max(*(size.steps for size in requests), -(-decoded // at_once))
    # A prefix is computed once, and its keys and values are read once in a step for all that share it.
    shared = max(size.shared for size in requests)
    read = steps * (weight_bytes + shared * model.cache_bytes_per_token)
    read += sum(_own_cache_bytes(model, size) for size in requests)
    multiplied = 2 * (model.layer_weights * shared + model.weights * decoded)
    multiplied += sum(_prefill_operations(model, size) for size in requests)
    return max(read / machine.read_bytes, multiplied / operations, *alone_seconds)


def _prefill_operations(model: ModelSize, size: Size) -> int:
    """Of the part of the prompt that is not shared: products, causal attention, and the head once."""
    pairs = (size.prompt**2 - size.shared**2) // 2
    attention = 4 * model.layers * model.query_heads * model.head_dim * pairs
    head = 2 * model.hidden * model.vocabulary
    return 2 * model.layer_weights * (size.prompt - size.shared) + attention + head


def _own_cache_bytes(model: ModelSize, size: Size) -> int:
    """Keys and values that its steps read, without the shared ones."""
    tokens = size.steps * (size.prompt - size.shared) + size.steps * (size.steps + 1) // 2
    return tokens * model.cache_bytes_per_token
