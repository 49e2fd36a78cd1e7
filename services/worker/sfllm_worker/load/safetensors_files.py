"""Reads safetensors checkpoints: one file, or several with an index.

A quantized weight of our own conversion is stored as tensors named after it: values, scales and offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfllm_worker.load.assets import read_json
from sfllm_worker.model.errors import ModelLoadError
from sfllm_worker.quant.weight import GROUP, QuantizedWeight

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_VALUES, _SCALES, _OFFSETS = ".values", ".scales", ".offsets"


def stored_parts(name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors under which a quantized weight is stored."""
    yield name + _VALUES, weight.values.contiguous()
    yield name + _SCALES, weight.scales.contiguous()
    if weight.offsets is not None:
        yield name + _OFFSETS, weight.offsets.contiguous()


class SafetensorsSource:
    """Named tensors of a directory, memory-mapped: a tensor is read from disk when it is taken."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._where = self._locate(directory)
        self._untaken = set(self._where)
        # Models without a head, such as those for embeddings, are often stored without this prefix.
        self._prefix = "model." if "embed_tokens.weight" in self._where else ""

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that name. Raises `ModelLoadError` when it is missing or has another shape."""
        name = name.removeprefix(self._prefix)
        file = self._where.get(name)
        if file is None:
            raise ModelLoadError(f"{self._directory}: tensor {name} is missing")
        try:
            tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise ModelLoadError(f"{self._directory}: tensor {name} cannot be read: {error}") from error
        if tuple(tensor.shape) != shape:
            raise ModelLoadError(
                f"{self._directory}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        self._untaken.discard(name)
        return tensor

    def take_quantized(self, name: str, shape: tuple[int, int], /) -> QuantizedWeight | None:
        """The weight of that name if it is stored quantized, else None. Raises as `take` does."""
        if name + _VALUES not in self._where:
            return None
        groups = (shape[0], -(-shape[1] // GROUP))
        return QuantizedWeight(
            self.take(name + _VALUES, shape),
            self.take(name + _SCALES, groups),
            self.take(name + _OFFSETS, groups) if name + _OFFSETS in self._where else None,
        )

    def untaken(self) -> list[str]:
        """Names that nobody asked for, sorted."""
        return sorted(self._untaken)

    @staticmethod
    def _locate(directory: Path) -> dict[str, Any]:
        """Tensor name to open file."""
        if (directory / SINGLE).is_file():
            file = _open(directory / SINGLE)
            return dict.fromkeys(file.keys(), file)
        if not (directory / INDEX).is_file():
            raise ModelLoadError(f"{directory} has neither {SINGLE} nor {INDEX}")
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelLoadError(f"{directory / INDEX} has no weight_map")
        files = {name: _open(directory / Path(str(name)).name) for name in sorted(set(weight_map.values()))}
        present = {name: set(file.keys()) for name, file in files.items()}
        for tensor, name in weight_map.items():
            if tensor not in present[name]:
                raise ModelLoadError(f"{directory / name}: tensor {tensor} is missing")
        return {tensor: files[name] for tensor, name in weight_map.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error
