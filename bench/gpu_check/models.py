"""Whole models against transformers: greedy texts in float32, teacher-forced logits in 16 bits."""

from __future__ import annotations

import copy
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench.gpu_check.checks import Check, Setting, largest_error, name_of, noise_to_signal
from model_references import Sequences, make_reference, reference_greedy, reference_logits
from model_variants import VARIANTS

from sfllm_worker.backends import make_triton_decoder
from sfllm_worker.load.safetensors_files import SafetensorsSource
from sfllm_worker.load.weights import build_weights
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.decoder import Decoder

ON_CPU = ("llama",)
ON_GPU = (
    "llama", "llama-biased", "llama3-rope", "llama-yarn", "mistral-window", "qwen2", "qwen3-tied",
    "phi3-partial-rotary", "smollm3-window", "gemma2", "gemma3-layer-types",
)  # fmt: skip
"""One for each thing that the kernels do differently."""
IN_16_BITS = ("llama", "qwen3-tied", "gemma2")
MOST_TOKENS = 64
ROUNDING_FACTOR = 1.5
"""How many times transformers' own error ours may be."""


def checks(setting: Setting) -> list[Check]:
    """float32 for all families, 16 bits for some."""
    names = ON_GPU if setting.on_gpu else ON_CPU
    exact = [
        Check(f"{name} float32 against transformers", partial(greedy_equal, setting, name)) for name in names
    ]
    rounded = [
        Check(
            f"{name} {name_of(dtype)} against float64, teacher-forced",
            partial(rounded_alike, setting, name, dtype),
            needs_gpu=True,
        )
        for name in IN_16_BITS
        for dtype in (torch.bfloat16, torch.float16)
    ]
    return exact + rounded


def greedy_equal(setting: Setting, name: str) -> str:
    """Greedy texts of two prompts in one batch are transformers', and so are a whole text's logits."""
    text, count = tokens_of_text(40 if setting.on_gpu else 6), 20 if setting.on_gpu else 3
    with tempfile.TemporaryDirectory() as directory:
        reference = make_reference(name, Path(directory))
        decoder = triton_decoder(Path(directory), torch.float32, setting.device)
    prompts = [text[:5], text[1:3]]
    ours = Sequences(decoder, 2, MOST_TOKENS).greedy(prompts, count)
    theirs = [reference_greedy(reference, prompt, count) for prompt in prompts]
    assert ours == theirs, f"greedy tokens differ: {ours} and {theirs}"
    [logits] = Sequences(decoder, 1, MOST_TOKENS).step([(0, text)])
    error = largest_error(logits, reference_logits(reference, text))
    assert error <= 2e-4, f"logits differ by {error:.1e}"
    return f"{2 * count} greedy tokens equal, logits within {error:.1e}"


@torch.inference_mode()
def rounded_alike(setting: Setting, name: str, dtype: torch.dtype) -> str:
    """Rounding costs about as much as in transformers, both against float64 with the same weights."""
    text = tokens_of_text(MOST_TOKENS)
    with tempfile.TemporaryDirectory() as directory:
        reference: Any = make_reference(name, Path(directory)).to(dtype)
        reference.save_pretrained(directory)
        decoder = triton_decoder(Path(directory), dtype, setting.device)
    exact = wide_logits(reference, text)
    theirs = reference.to(setting.device)(torch.tensor([text], device=setting.device)).logits[0]
    run = Sequences(decoder, 1, MOST_TOKENS)
    [chunk] = run.step([(0, text[:40])])
    ours = torch.cat([chunk, *(run.step([(0, [token])])[0] for token in text[40:])])
    own, other = noise_to_signal(ours, exact), noise_to_signal(theirs, exact)
    assert own <= ROUNDING_FACTOR * other, f"noise {own:.4f} of the logits' spread, transformers {other:.4f}"
    return f"noise {own:.4f} of the logits' spread, transformers {other:.4f}"


def wide_logits(reference: Any, text: list[int]) -> torch.Tensor:
    """Logits of transformers' model in float64, with the weights that it has."""
    logits: torch.Tensor = copy.deepcopy(reference).double()(torch.tensor([text])).logits[0]
    return logits


@torch.inference_mode()
def triton_decoder(directory: Path, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The decoder in the kernels, whatever the device."""
    config = ModelConfig.from_hf(json.loads((directory / "config.json").read_text()))
    weights = build_weights(config, SafetensorsSource(directory), dtype, device)
    return make_triton_decoder(config, weights, None)


def tokens_of_text(count: int) -> list[int]:
    """Token ids of every tiny model's vocabulary; not the first three, which may be special."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 299, (count,), generator=generator).tolist()


assert set(ON_GPU) <= set(VARIANTS)
