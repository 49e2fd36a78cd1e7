"""Fixtures for the tests of the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from openai_server import OpenAIServer, running


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with running(OpenAIServer()) as server:
        yield server


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SFLLM_") and name != "SFLLM_CACHE_DIR":
            monkeypatch.delenv(name)
