"""Fixtures of this folder."""

from __future__ import annotations

import pytest
from rerun_recorder import RerunRecorder, make_decoder

from sfllm_worker.model.decoder import Decoder


@pytest.fixture
def recorder() -> RerunRecorder:
    return RerunRecorder()


@pytest.fixture(scope="session")
def plain() -> Decoder:
    return make_decoder()


@pytest.fixture(scope="session")
def windowed() -> Decoder:
    """The first layer sees five tokens only."""
    return make_decoder(
        architectures=["Qwen3ForCausalLM"],
        sliding_window=5,
        use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"],
    )
