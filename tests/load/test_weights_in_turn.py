"""Weights go to the device one at a time: the host never holds a second copy of the model."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from model_references import make_reference

from sfllm_worker.load.assets import read_json
from sfllm_worker.load.dummy import DummySource
from sfllm_worker.load.safetensors_files import SafetensorsSource
from sfllm_worker.load.weights import build_weights
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.quant.weight import QuantizedWeight


class WatchedSource:
    """Hands tensors on, and says how many bytes of them are still alive at each turn."""

    def __init__(self, source: SafetensorsSource) -> None:
        self.source = source
        self.taken: list[weakref.ref[torch.Tensor]] = []
        self.most_alive = 0

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self.source.take(name, shape)
        self.taken.append(weakref.ref(tensor))
        self.most_alive = max(self.most_alive, sum(alive() is not None for alive in self.taken))
        return tensor

    def take_quantized(self, name: str, shape: tuple[int, int], /) -> QuantizedWeight | None:
        return self.source.take_quantized(name, shape)


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_stored_tensor_is_let_go_of_before_the_next_is_read(
    variant: str, device: str, tmp_path: Path
) -> None:
    make_reference(variant, tmp_path)
    config = ModelConfig.from_hf(read_json(tmp_path / "config.json"))
    source = WatchedSource(SafetensorsSource(tmp_path))
    with torch.inference_mode():
        weights = build_weights(config, source, torch.bfloat16, torch.device(device))
    assert len(source.taken) > 8 * config.num_layers
    assert source.most_alive == 1
    assert weights.final_norm.device.type == device


def test_random_weights_are_made_where_they_are_to_be() -> None:
    source = DummySource(0, torch.bfloat16, torch.device("meta"))
    for name, shape in (("x.weight", (3000, 500)), ("x.bias", (7,)), ("norm.weight", (7,))):
        assert source.take(name, shape).device.type == "meta"
