"""SmolLM2 as our own conversion, shared by the tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sfllm_worker.load.gguf_cache import converted


@pytest.fixture(scope="session")
def smollm2_directory(smollm2_gguf: Path) -> Iterator[Path]:
    """The default model, converted afresh to float32; half a gigabyte, so it is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="sfllm-test-") as cache:
        yield converted(smollm2_gguf, torch.float32, Path(cache))
