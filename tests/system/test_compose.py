"""deploy/compose on a real Docker engine: images, health, a chat completion, an orderly stop."""

from __future__ import annotations

import json
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from base_image import COMPOSE_FILE, SERVICES
from compose_stack import Stack, free_port, until_down
from docker_engine import Engine

from sfllm.model_files import resolve_model

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def url() -> str:
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def stack(docker: Engine, images: dict[str, str], url: str) -> Iterator[Stack]:
    models = Path(tempfile.mkdtemp(prefix="sfllm-models-"))
    try:
        _copy_default_model(models)
        port = url.rpartition(":")[2]
        variables = {**images, "SFLLM_PORT": port, "SFLLM_MODELS": str(models)}
        stack = Stack(docker, ("--file", str(COMPOSE_FILE), "--project-name", "sfllm-test"), variables)
        with until_down(stack):
            stack.up()
            yield stack
    finally:
        shutil.rmtree(models, ignore_errors=True)


def _copy_default_model(models: Path) -> None:
    """The model's file where the worker looks for it, in a folder that the worker's user may write to."""
    models.chmod(0o777)
    downloads = models / "downloads"
    downloads.mkdir()
    downloads.chmod(0o777)
    shutil.copy(resolve_model("smollm2"), downloads)


def test_a_chat_completion_comes_through_three_containers(stack: Stack, url: str) -> None:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 24,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        completion = json.load(answer)
    assert "Paris" in completion["choices"][0]["message"]["content"]
    assert completion["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_healthy_and_not_root(stack: Stack, service: str) -> None:
    assert stack.inspect(service, "{{.State.Health.Status}}") == "healthy"
    assert stack.inspect(service, "{{.Config.User}}") == "10001"


@pytest.mark.parametrize("service", ["scheduler", "gateway"])
def test_only_the_worker_carries_torch(stack: Stack, service: str) -> None:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    stack.engine.run("exec", stack.container(service), "python3", "-c", code)


def test_a_stop_is_orderly_everywhere(stack: Stack) -> None:
    stack.compose("stop")
    assert {name: stack.inspect(name, "{{.State.ExitCode}}") for name in SERVICES} == dict.fromkeys(
        SERVICES, "0"
    )
