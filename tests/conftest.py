"""Fixtures that several folders of tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfllm.model_files import DEFAULT_MODEL, resolve_model


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The default model's file, fetched once and kept in the cache directory."""
    return resolve_model(DEFAULT_MODEL)
