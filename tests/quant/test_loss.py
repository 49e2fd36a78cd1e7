"""What quantization may cost on the default model, and what it must not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from quantization_loss import TEXT, Reading, read, text_windows

from sfllm_worker.load import load_model
from sfllm_worker.load.gguf_cache import converted

WINDOWS = 2


def reading(path: Path, quantization: str) -> Reading:
    model = load_model(path, dtype="bfloat16", quantization=quantization)
    return read(model.decoder, text_windows(model, TEXT.read_text(encoding="utf-8"))[:WINDOWS], 16)


@pytest.fixture(scope="module")
def plain(smollm2_gguf: Path) -> Reading:
    return reading(smollm2_gguf, "none")


def test_the_text_is_one_that_the_model_reads(plain: Reading) -> None:
    assert 10 < plain.perplexity < 40


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_four_bit_weights_of_a_file_are_read_without_any_loss(
    plain: Reading, smollm2_gguf: Path, quantization: str
) -> None:
    ours = reading(smollm2_gguf, quantization)
    # The weights are the same; plain torch may add in another order than the native kernels.
    assert math.isclose(ours.perplexity, plain.perplexity, rel_tol=1e-3)
    assert ours.agreement(plain) > 0.995


@pytest.fixture(scope="module")
def rounded(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a checkpoint of floats."""
    return converted(smollm2_gguf, torch.float32, tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize(("quantization", "loss", "agreement"), [("int8", 1.01, 0.95), ("int4", 1.01, 0.95)])
def test_a_checkpoint_loses_no_more_than_is_stated(
    plain: Reading, rounded: Path, quantization: str, loss: float, agreement: float
) -> None:
    ours = reading(rounded, quantization)
    assert ours.perplexity < plain.perplexity * loss
    assert ours.agreement(plain) > agreement
