"""System tests: run by `make test-system`, skipped with the reason everywhere else."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from base_image import build_images
from client_scripts import Clients
from docker_engine import Engine, EngineUnavailableError, engine
from running_stack import RunningStack

CLIENTS_KEY = "key-of-the-clients"
CLIENTS_MODEL = "smollm2-135m-instruct"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A bare `pytest` must not start a Docker engine."""
    if "system" in (config.option.markexpr or ""):
        return
    for item in items:
        if item.get_closest_marker("system"):
            item.add_marker(pytest.mark.skip(reason="a system test: make test-system runs it"))


def without_containers(error: EngineUnavailableError) -> NoReturn:
    """Say loudly that nothing was tested: a failure, unless it was said before that it is none."""
    if os.environ.get("SFLLM_SKIP_STACK_TEST") == "1":
        pytest.skip(f"NO CONTAINERS WERE TESTED: {error}")
    pytest.fail(f"NO CONTAINERS WERE TESTED: {error}\nSFLLM_SKIP_STACK_TEST=1 goes on without them")


@pytest.fixture(scope="session")
def docker_directory() -> Iterator[Path]:
    """A folder with a short name, as socket files need, for gigabytes of images."""
    directory = Path(tempfile.mkdtemp(prefix="sfllm-docker-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def docker(docker_directory: Path) -> Iterator[Engine]:
    try:
        with engine(docker_directory) as running:
            yield running
    except EngineUnavailableError as error:
        without_containers(error)


@pytest.fixture(scope="session")
def images(docker: Engine, docker_directory: Path) -> dict[str, str]:
    """The images of the compose file, built once; the variables by which it finds them."""
    try:
        return build_images(docker, docker_directory)
    except EngineUnavailableError as error:
        without_containers(error)


@pytest.fixture(scope="session")
def clients(smollm2_gguf: Path) -> Iterator[Clients]:
    """The default model behind an API key, for clients in environments of their own."""
    with tempfile.TemporaryDirectory(prefix="sfllm-clients-") as home:
        running = RunningStack(f"--api-key={CLIENTS_KEY}", "--max-context-length=2048")
        try:
            running.wait_until_ready()
            yield Clients(running.url, CLIENTS_KEY, CLIENTS_MODEL, Path(home))
        finally:
            code = running.stop()
    assert code == 0
