"""Weights out of GGUF files, against GGUF's own unpacking in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from sfllm_worker.load.gguf import GgufFile
from sfllm_worker.load.gguf_blocks import unpack_blocks
from sfllm_worker.load.gguf_cache import converted
from sfllm_worker.load.safetensors_files import SafetensorsSource
from sfllm_worker.quant.weight import QuantizedWeight

BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}


@pytest.mark.parametrize("name", BITS)
def test_blocks_come_back_to_the_last_bit(name: str) -> None:
    kind = GGMLQuantizationType[name]
    values = np.random.default_rng(1).normal(size=(33, 96)).astype(np.float32)
    values[3] = 0.0
    blocks = quants.quantize(values, kind)
    weight = unpack_blocks(blocks, kind)
    assert weight is not None
    assert weight.bits == BITS[name]
    assert torch.equal(weight.dequantize(), torch.from_numpy(quants.dequantize(blocks, kind)))


def test_other_types_are_left_to_the_quantizer() -> None:
    assert unpack_blocks(np.zeros((1, 32), np.float32), GGMLQuantizationType.F32) is None
    assert unpack_blocks(np.zeros((1, 210), np.uint8), GGMLQuantizationType.Q6_K) is None


@pytest.fixture(scope="module")
def default_model(smollm2_gguf: Path) -> GgufFile:
    return GgufFile(smollm2_gguf)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_weight_of_the_default_model_is_what_the_file_says(default_model: GgufFile, bits: int) -> None:
    config = default_model.config()
    plain = dict(default_model.tensors(config))
    kinds = set()
    for name, weight in default_model.tensors(config, bits):
        exact = plain[name]
        assert isinstance(exact, Tensor)
        if isinstance(weight, QuantizedWeight):
            kinds.add((weight.bits, weight.offsets is not None))
            assert torch.equal(weight.dequantize(), exact), name
        else:
            assert exact.ndim == 1
            assert torch.equal(weight, exact)
    assert kinds == {(4, True), (8, False)}  # all layers, and the tied head: the file has no others


def test_a_converted_directory_keeps_the_packed_weights(smollm2_gguf: Path, tmp_path: Path) -> None:
    directory = converted(smollm2_gguf, torch.bfloat16, tmp_path, "int4")
    dense = converted(smollm2_gguf, torch.float32, tmp_path)
    assert directory.name != dense.name
    name, shape = "model.layers.7.self_attn.q_proj.weight", (576, 576)
    weight = SafetensorsSource(directory).take_quantized(name, shape)
    assert weight is not None
    assert torch.equal(weight.dequantize(), SafetensorsSource(dense).take(name, shape))
    assert SafetensorsSource(dense).take_quantized(name, shape) is None
