from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from running_stack import RunningStack


@pytest.fixture(scope="session")
def stack(smollm2_gguf: Path) -> Iterator[RunningStack]:
    """The default model in float32, whose results can be compared exactly."""
    running = RunningStack(
        "--dtype=float32",
        "--max-context-length=2048",
        "--pooling=mean",
        "--log-format=json",
        "--log-level=debug",
    )
    running.wait_until_ready()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def client(stack: RunningStack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{stack.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as opened:
        yield opened


@pytest.fixture(scope="session")
def lenient_client(stack: RunningStack) -> Iterator[openai.OpenAI]:
    """For what OpenAI's servers send and the client's strict types do not allow: null as finish_reason of a
    streamed completion, and as log probability of an echoed text's first token."""
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="session")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id
