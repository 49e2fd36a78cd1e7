"""`make stack-test`: the compose stack as an operator has it, on a real Docker engine.

Two stacks: one with the default model, which answers the OpenAI client through nginx, and one with made-up
tokens, in which containers are killed, paused, cut off and rolled under streams that must not notice.
"""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import zmq
from base_image import COMPOSE_FILE, SERVICES
from compose_stack import Stack, free_port, until_down
from docker_engine import Engine
from openai import OpenAI
from stack_load import Load

from sfllm.model_files import resolve_model
from sfllm_cli.main import main as sfllm

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

MODEL = "smollm2-135m-instruct"
MOCKS = """
services:
  gateway: {scale: 2, ports: !reset []}
  worker: {environment: {SFLLM_MOCK: "true", SFLLM_MODEL: mock, SFLLM_MOCK_TOKENS_PER_SECOND: "40"}}
"""


@pytest.fixture(scope="module")
def real(docker: Engine, images: dict[str, str]) -> Iterator[tuple[Stack, str]]:
    """The stack with the default model, and where its nginx is."""
    models, port = Path(tempfile.mkdtemp(prefix="sfllm-models-")), free_port()
    try:
        _copy_default_model(models)
        variables = {
            **images,
            "SFLLM_PORT": str(free_port()),
            "SFLLM_PROXY_PORT": str(port),
            "SFLLM_MODELS": str(models),
            "SFLLM_WORKER_MEMORY": "6g",
        }
        arguments = ("--file", str(COMPOSE_FILE), "--project-name", "sfllm-test", "--profile", "proxy")
        stack = Stack(docker, arguments, variables)
        with until_down(stack):
            stack.up()
            yield stack, f"http://127.0.0.1:{port}"
    finally:
        shutil.rmtree(models, ignore_errors=True)
    assert not left_behind(docker, "sfllm-test")


def _copy_default_model(models: Path) -> None:
    """The model's file where the worker looks for it, in a folder that the worker's user may write to."""
    models.chmod(0o777)
    downloads = models / "downloads"
    downloads.mkdir()
    downloads.chmod(0o777)
    shutil.copy(resolve_model("smollm2"), downloads)


def left_behind(docker: Engine, project: str) -> str:
    """Containers, networks and volumes of a project that are still there."""
    of_project = ("--quiet", "--filter", f"label=com.docker.compose.project={project}")
    kinds = (("ps", "--all"), ("network", "ls"), ("volume", "ls"))
    return "".join(docker.run(*kind, *of_project).stdout for kind in kinds)


@pytest.fixture(scope="module")
def client(real: tuple[Stack, str]) -> OpenAI:
    return OpenAI(base_url=f"{real[1]}/v1", api_key="none", max_retries=0, timeout=120)


def test_the_openai_client_gets_an_answer_through_nginx(client: OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    question = "What is the capital of France?"
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], max_tokens=24, temperature=0
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    chunks = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=24,
        temperature=0,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content


def test_an_error_comes_through_nginx_as_the_client_knows_it(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt="x")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="x", max_tokens=-1)


@pytest.mark.parametrize("service", SERVICES)
def test_containers_are_healthy_and_have_few_rights(real: tuple[Stack, str], service: str) -> None:
    stack, _ = real
    state: dict[str, Any] = json.loads(stack.inspect(service, "{{json .}}"))
    host = state["HostConfig"]
    assert state["State"]["Health"]["Status"] == "healthy"
    assert state["Config"]["User"] == "10001"
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["PidsLimit"]) == (True, ["ALL"], 1024)
    assert host["Memory"] == {"scheduler": 2**30, "gateway": 2 * 2**30, "worker": 6 * 2**30}[service]
    assert host["NanoCpus"] == {"scheduler": 10**9, "gateway": 2 * 10**9, "worker": 0}[service]
    links = [mount for mount in state["Mounts"] if mount["Destination"] == "/run/sfllm/links"]
    assert [mount["RW"] for mount in links] == [False]


@pytest.mark.parametrize("service", ["scheduler", "gateway"])
def test_only_the_worker_carries_torch(real: tuple[Stack, str], service: str) -> None:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    stack, _ = real
    stack.engine.run("exec", stack.container(service), "python3", "-c", code)


def test_a_service_sees_no_keys_but_its_own(real: tuple[Stack, str]) -> None:
    stack, _ = real
    for service in SERVICES:
        shown = stack.engine.run("exec", stack.container(service), "cat", "/run/sfllm/links/link.keys")
        assert f'role = "{service}"' in shown.stdout
        assert shown.stdout.count("secret-key") == 1


def test_a_peer_without_keys_is_refused_at_the_schedulers_port(real: tuple[Stack, str]) -> None:
    stack, _ = real
    context: zmq.Context[zmq.Socket[bytes]]
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(f"tcp://{address_of(stack, 'scheduler')}:5558")
        stranger.send(b"let me in")
        until(lambda: metric(stack, 'scheduler_links_refused_total{socket="worker"}') >= 1)
    assert metric(stack, "links_encrypted") == 1


def test_the_doctor_finds_nothing_to_mend(real: tuple[Stack, str]) -> None:
    stack, url = real
    admin = [f"--admin={address_of(stack, service)}:9090" for service in SERVICES]
    assert sfllm(["doctor", f"--url={url}", "--sample-seconds=0", *admin]) == 0


def address_of(stack: Stack, service: str) -> str:
    return stack.inspect(service, "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")


def metric(stack: Stack, key: str) -> float:
    """One of the scheduler's figures."""
    with urllib.request.urlopen(
        f"http://{address_of(stack, 'scheduler')}:9090/metrics", timeout=10
    ) as answer:
        lines = [line.rpartition(" ") for line in answer.read().decode().splitlines()]
    return next((float(value) for name, _, value in lines if name == f"sfllm:{key}"), 0.0)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_stop_is_orderly_everywhere(real: tuple[Stack, str]) -> None:
    stack, _ = real
    stack.compose("stop")
    codes = {name: stack.inspect(name, "{{.State.ExitCode}}") for name in (*SERVICES, "nginx")}
    assert codes == dict.fromkeys((*SERVICES, "nginx"), "0")


@pytest.fixture(scope="module")
def fleet(
    docker: Engine, images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Stack, str]]:
    """Two gateways and one worker that makes tokens up, and where nginx is."""
    override = tmp_path_factory.mktemp("stack") / "mocks.yaml"
    override.write_text(MOCKS)
    port = free_port()
    files = ("--file", str(COMPOSE_FILE), "--file", str(override))
    stack = Stack(
        docker,
        (*files, "--project-name", "sfllm-fleet", "--profile", "proxy"),
        {**images, "SFLLM_PROXY_PORT": str(port)},
    )
    with until_down(stack):
        stack.up()
        yield stack, f"http://127.0.0.1:{port}"
    assert not left_behind(docker, "sfllm-fleet")
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def containers(stack: Stack, service: str) -> list[str]:
    return sorted(stack.compose("ps", "--quiet", service).split())


def serving(stack: Stack) -> float:
    return metric(stack, 'workers{state="serving"}')


def test_nothing_is_lost_while_containers_come_go_and_are_rolled(fleet: tuple[Stack, str]) -> None:
    stack, url = fleet
    docker = stack.engine
    with Load(url, "mock").running() as load:
        load.wait_for(8)
        stack.compose("up", "--detach", "--no-build", "--no-recreate", "--scale", "worker=3", "worker")
        until(lambda: serving(stack) == 3)
        first, second, third = containers(stack, "worker")

        docker.run("kill", first)
        load.wait_for(16)
        docker.run("start", first)
        until(lambda: serving(stack) == 3)

        docker.run("pause", second)
        load.wait_for(16)
        docker.run("unpause", second)
        until(lambda: serving(stack) == 3)

        docker.run("network", "disconnect", "sfllm-fleet_default", third)
        load.wait_for(16)
        docker.run("network", "connect", "sfllm-fleet_default", third)
        until(lambda: serving(stack) == 3)

        for service in ("gateway", "scheduler", "worker"):
            for container in containers(stack, service):
                docker.run("restart", "--time", "40", container)
                until(lambda healthy=container: is_healthy(docker, healthy))
                load.wait_for(8)
        until(lambda: serving(stack) == 3)
    assert load.failures == []
    assert load.finished > 100


def is_healthy(docker: Engine, container: str) -> bool:
    shown = docker.run("inspect", "--format", "{{.State.Health.Status}}", container)
    return shown.stdout.strip() == "healthy"
