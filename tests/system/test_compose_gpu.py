"""The GPU overlay: what compose makes of it, and that containers which all see every GPU take one each.

There is no GPU: workers are mocks, `nvidia-smi` is made up, and the engine is asked for no device.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from base_image import COMPOSE_FILE
from compose_stack import Stack, until_down
from docker_engine import Engine
from fake_nvidia_smi import listing, uuid_of, write_listing

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

GPU_FILE = COMPOSE_FILE.with_name("compose.gpu.yaml")
FILES = ("--file", str(COMPOSE_FILE), "--file", str(GPU_FILE))
CLAIMS = "/run/sfllm/gpus"
GPUS = tuple(uuid_of(letter) for letter in "ab")
ONE_MORE = len(GPUS) + 1
SECONDS = 120.0

OVERRIDE = """
services:
  worker:
    image: sfllm-worker
    restart: "no"
    environment:
      {SFLLM_MOCK: "true", SFLLM_MODEL: mock, SFLLM_LOG_FORMAT: json, SFLLM_GPU_CLAIM_SECONDS: "300"}
    volumes: ["%s:/usr/local/bin/nvidia-smi:ro"]
    deploy: {resources: {reservations: {devices: !reset []}}}
volumes: {gpus: {name: sfllm-test-gpus}}
"""
METRICS = (
    "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:9090/metrics').read().decode())"
)


def configured(docker: Engine, *files: str, **variables: str) -> dict[str, Any]:
    """What compose makes of these files."""
    shown = docker.run_compose(*files, "--profile", "*", "config", "--format", "json", **variables)
    services: dict[str, Any] = json.loads(shown.stdout)
    return services


def test_the_overlay_shows_every_gpu_to_workers_that_share_a_folder_of_claims(docker: Engine) -> None:
    config = configured(docker, *FILES)
    worker = config["services"]["worker"]
    [devices] = worker["deploy"]["resources"]["reservations"]["devices"]
    assert (devices["driver"], devices["count"]) == ("nvidia", -1)  # all of them
    assert {"gpu", "compute", "utility"} <= set(devices["capabilities"])
    assert worker["environment"]["SFLLM_DEVICE"] == "cuda"
    assert worker["environment"]["SFLLM_GPU_CLAIMS"] == CLAIMS
    [claims] = [volume for volume in worker["volumes"] if volume["target"] == CLAIMS]
    assert claims["type"] == "volume"
    assert config["volumes"][claims["source"]]["name"] == "sfllm-gpus"  # whatever the project
    assert worker["image"] == "sfllm-worker-cuda"
    assert worker["build"]["args"]["TORCH"] == "cuda"


def test_the_overlay_changes_nothing_but_workers(docker: Engine) -> None:
    plain, with_gpus = (configured(docker, *files)["services"] for files in (FILES[:2], FILES))
    assert [name for name in plain if plain[name] != with_gpus[name]] == ["worker"]
    assert set(plain) == set(with_gpus)


def test_a_host_of_workers_alone_takes_the_overlay_as_well(docker: Engine) -> None:
    files = ("--file", str(COMPOSE_FILE.with_name("compose.workers.yaml")), *FILES[2:])
    services = configured(docker, *files, SFLLM_SCHEDULER_HOST="scheduler.internal")["services"]
    assert set(services) == {"worker"}
    assert services["worker"]["environment"]["SFLLM_GPU_CLAIMS"] == CLAIMS
    assert CLAIMS in {volume["target"] for volume in services["worker"]["volumes"]}


def test_variables_choose_number_formats_and_gpus(docker: Engine) -> None:
    chosen = {"SFLLM_DTYPE": "float16", "SFLLM_QUANTIZATION": "fp8", "CUDA_VISIBLE_DEVICES": GPUS[1]}
    given = configured(docker, *FILES, **chosen)["services"]["worker"]["environment"]
    assert {name: given[name] for name in chosen} == chosen


@pytest.fixture
def stack(
    docker: Engine, images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("gpus")
    write_listing(directory, listing(GPUS))
    override = directory / "override.yaml"
    override.write_text(OVERRIDE % (directory / "nvidia-smi"))
    stack = Stack(docker, (*FILES, "--file", str(override), "--project-name", "sfllm-gpus"), images)
    with until_down(stack):
        yield stack


def test_containers_claim_a_gpu_each_and_the_last_one_takes_over_from_a_killed_one(stack: Stack) -> None:
    stack.compose("up", "--detach", "--no-build", "--scale", f"worker={ONE_MORE}", "scheduler", "worker")
    workers = stack.container("worker").split()
    assert len(workers) == ONE_MORE
    claimed = {
        worker: wait_for(stack, worker, "GPU claimed", "every GPU is claimed, waiting") for worker in workers
    }
    [waiting] = [worker for worker, event in claimed.items() if "gpu" not in event]
    owners = {event["gpu"]: worker for worker, event in claimed.items() if "gpu" in event}
    assert set(owners) == set(GPUS)
    # A container's host name is the beginning of its id; one that has only just claimed has left no word yet.
    for uuid, said in claimed[waiting]["holders"].items():
        assert f"on {owners[uuid][:12]} since" in said or "started" in said
    killed = owners[GPUS[1]]
    stack.engine.run("kill", "--signal", "KILL", killed)
    assert wait_for(stack, waiting, "GPU claimed")["gpu"] == GPUS[1]
    assert wait_for(stack, waiting, "worker ready")
    page = stack.engine.run("exec", waiting, "python3", "-c", METRICS).stdout
    [line] = [line for line in page.splitlines() if line.startswith("sfllm:gpu_info{")]
    assert f'uuid="{GPUS[1]}"' in line


def wait_for(stack: Stack, container: str, *events: str) -> dict[str, Any]:
    """The first event in a container's log that has one of these names."""
    deadline = time.monotonic() + SECONDS
    while True:
        logged = stack.engine.run("logs", container)
        for line in (logged.stdout + logged.stderr).splitlines():
            event: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
            if event.get("event") in events:
                return event
        assert time.monotonic() < deadline, (
            f"{container} never said {events}:\n{logged.stdout}{logged.stderr}"
        )
        time.sleep(0.3)
