"""Whole steps of the GPU's decoder in Triton's interpreter, against transformers and plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_references import Sequences, make_reference, reference_greedy, reference_logits, stepwise_logits
from model_variants import VARIANTS

from sfllm_worker.backends import make_triton_decoder
from sfllm_worker.kernels.decoder import TritonDecoder
from sfllm_worker.load.safetensors_files import SafetensorsSource
from sfllm_worker.load.weights import build_weights
from sfllm_worker.model.attention import TorchAttention
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.decoder import Decoder

NAMES = [
    "llama-biased",
    "llama-dynamic-rope",
    "qwen3-tied",
    "phi3-partial-rotary",
    "smollm3-window",
    "gemma2",
    "gemma3-layer-types",
]
"""One for each thing that the kernels do differently."""
WITH_TRITON_ATTENTION = {"gemma2"}
"""With every option of attention. The others attend in plain torch, which the interpreter does not slow."""
TEXTS = ([5, 211, 17, 99, 42, 280, 9], [150, 3, 77, 208])


class Pair:
    def __init__(self, name: str, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.reference: Any = make_reference(name, directory)
        raw = json.loads((directory / "config.json").read_text())
        self.config = ModelConfig.from_hf(raw)
        with torch.inference_mode():
            source = SafetensorsSource(directory)
            self.weights = build_weights(self.config, source, dtype, torch.device("cpu"))
            if name in WITH_TRITON_ATTENTION:
                self.decoder = make_triton_decoder(self.config, self.weights, 64)
            else:
                self.decoder = TritonDecoder(self.config, self.weights, TorchAttention(self.config), 64)


def mixed_steps(run: Sequences) -> list[torch.Tensor]:
    """Logits of both texts: a chunk, a decode beside a chunk, then decodes together."""
    first, second = TEXTS
    [start] = run.step([(0, first[:4])])
    [one, other] = run.step([(0, first[4:5]), (1, second[:3])])
    [two, last] = run.step([(0, first[5:6]), (1, second[3:])])
    [three] = run.step([(0, first[6:])])
    return [torch.cat((start, one, two, three)), torch.cat((other, last))]


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_decodes_together_give_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    pair = Pair(name, tmp_path)
    reference = reference_logits if VARIANTS[name].reference == "whole" else stepwise_logits
    for ours, text in zip(mixed_steps(Sequences(pair.decoder, 2, 12)), TEXTS, strict=True):
        theirs = reference(pair.reference, text)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_greedy_texts_are_those_of_transformers(tmp_path: Path) -> None:
    pair, prompts = Pair("llama", tmp_path), [TEXTS[0][:2], TEXTS[1][:1]]
    expected = [reference_greedy(pair.reference, prompt, 5) for prompt in prompts]
    assert Sequences(pair.decoder, 2, 12).greedy(prompts, 5) == expected


def test_float16_steps_are_close_to_those_of_plain_torch(tmp_path: Path) -> None:
    pair = Pair("gemma2", tmp_path, torch.float16)
    plain = Decoder(pair.config, pair.weights)
    runs = [mixed_steps(Sequences(decoder, 2, 12)) for decoder in (pair.decoder, plain)]
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)
        assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.9999
