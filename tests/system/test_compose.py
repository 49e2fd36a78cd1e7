"""deploy/compose on a real Docker engine: images, health, a chat completion, an orderly stop."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from base_image import make_base_image, torch_wheel_served
from docker_engine import Engine, EngineUnavailableError

from sfllm.model_files import resolve_model

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

COMPOSE_FILE = Path(__file__).parents[2] / "deploy" / "compose" / "compose.yaml"
SERVICES = ("scheduler", "worker", "gateway")


@dataclass(frozen=True)
class Stack:
    """The stack that is up, and how to give it commands."""

    engine: Engine
    url: str
    arguments: tuple[str, ...]
    variables: dict[str, str]

    def compose(self, *arguments: str, seconds: float = 300) -> str:
        return self.engine.run_compose(*self.arguments, *arguments, seconds=seconds, **self.variables).stdout

    def container(self, service: str) -> str:
        return self.compose("ps", "--all", "--quiet", service).strip()

    def inspect(self, service: str, template: str) -> str:
        return self.engine.run("inspect", "--format", template, self.container(service)).stdout.strip()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def stack(docker: Engine, docker_directory: Path) -> Iterator[Stack]:
    models = Path(tempfile.mkdtemp(prefix="sfllm-models-"))
    wheels = docker_directory / "wheels"
    wheels.mkdir()
    try:
        _copy_default_model(models)
        try:
            base = make_base_image(docker, docker_directory)
        except EngineUnavailableError as error:
            pytest.skip(f"NO CONTAINERS WERE TESTED: {error}")
        # The build reaches this machine's loopback, where the wheel is.
        override = docker_directory / "override.yaml"
        override.write_text(
            json.dumps({"services": {name: {"build": {"network": "host"}} for name in SERVICES}})
        )
        port = free_port()
        stack = Stack(
            docker,
            f"http://127.0.0.1:{port}",
            ("--file", str(COMPOSE_FILE), "--file", str(override), "--project-name", "sfllm-test"),
            {"BASE_IMAGE": base, "SFLLM_PORT": str(port), "SFLLM_MODELS": str(models)},
        )
        with torch_wheel_served(wheels) as links:
            stack.variables["PIP_FIND_LINKS"] = links
            stack.compose("build", seconds=1200)
        try:
            stack.compose("up", "--detach", "--wait", "--wait-timeout", "240")
            yield stack
        finally:
            print(stack.compose("logs", "--no-color", "--tail", "200"))
            stack.compose("down", "--volumes", "--timeout", "10")
    finally:
        shutil.rmtree(models, ignore_errors=True)


def _copy_default_model(models: Path) -> None:
    """The model's file where the worker looks for it, in a folder that the worker's user may write to."""
    models.chmod(0o777)
    downloads = models / "downloads"
    downloads.mkdir()
    downloads.chmod(0o777)
    shutil.copy(resolve_model("smollm2"), downloads)


def test_a_chat_completion_comes_through_three_containers(stack: Stack) -> None:
    with urllib.request.urlopen(f"{stack.url}/v1/models", timeout=30) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 24,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{stack.url}/v1/chat/completions",
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
