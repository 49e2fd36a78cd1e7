"""Fixtures that several folders of tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sfllm.model_files import DEFAULT_MODEL, resolve_model

# GPU kernels run in Triton's interpreter, which must be chosen before anything first imports triton.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The default model's file, fetched once and kept in the cache directory."""
    return resolve_model(DEFAULT_MODEL)
