"""The compose stack with what stands around it: nginx, and Prometheus, which finds every container."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from base_image import COMPOSE_FILE, SERVICES
from compose_stack import Stack, free_port, until_down
from docker_engine import Engine

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

# Made-up tokens, two gateways, and no file system that can be written to but /tmp: as in Kubernetes.
OVERRIDE = """
services:
  scheduler: {read_only: true, tmpfs: [/tmp]}
  worker: {read_only: true, tmpfs: [/tmp], environment: {SFLLM_MOCK: "true", SFLLM_MODEL: mock}}
  gateway: {read_only: true, tmpfs: [/tmp], scale: 2, ports: !reset []}
"""


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    return {"SFLLM_PROXY_PORT": free_port(), "PROMETHEUS_PORT": free_port()}


@pytest.fixture(scope="module")
def stack(
    docker: Engine, images: dict[str, str], ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    override = tmp_path_factory.mktemp("profiles") / "override.yaml"
    override.write_text(OVERRIDE)
    files = ("--file", str(COMPOSE_FILE), "--file", str(override))
    stack = Stack(
        docker,
        (*files, "--project-name", "sfllm-profiles", "--profile", "proxy", "--profile", "monitoring"),
        {**images, **{name: str(port) for name, port in ports.items()}},
    )
    with until_down(stack):
        # All but Grafana, which Debian does not have.
        stack.up("nginx", "prometheus", *SERVICES)
        yield stack


@pytest.fixture
def proxy(stack: Stack, ports: dict[str, int]) -> str:
    return f"http://127.0.0.1:{ports['SFLLM_PROXY_PORT']}"


def read(url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def answers(proxy: str) -> bool:
    """Whether a completion comes through nginx."""
    try:
        completion = read(f"{proxy}/v1/completions", {"prompt": "Tell me", "max_tokens": 5})
    except urllib.error.HTTPError as error:
        if error.code not in {502, 504}:
            raise
        return False
    return bool(completion["usage"]["completion_tokens"] == 5)


def test_completions_come_through_nginx_from_services_with_read_only_files(stack: Stack, proxy: str) -> None:
    for _ in range(4):  # both gateways
        assert answers(proxy)
    assert stack.inspect("nginx", "{{.Config.User}} {{.HostConfig.ReadonlyRootfs}}") == "101:101 true"
    assert stack.inspect("scheduler", "{{.HostConfig.ReadonlyRootfs}}") == "true"


def test_prometheus_finds_all_containers_also_after_a_scale_up(stack: Stack, ports: dict[str, int]) -> None:
    stack.compose("up", "--detach", "--no-build", "--no-recreate", "--scale", "worker=3", "worker")
    wanted = {"sfllm-gateway": 2, "sfllm-scheduler": 1, "sfllm-worker": 3}
    url = f"http://127.0.0.1:{ports['PROMETHEUS_PORT']}/api/v1"

    def all_are_scraped() -> bool:
        targets = read(f"{url}/targets")["data"]["activeTargets"]
        return Counter(each["labels"]["job"] for each in targets if each["health"] == "up") == wanted

    wait_until(all_are_scraped, f"not scraped: {wanted}")
    rules = [rule for group in read(f"{url}/rules")["data"]["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}  # unknown: not evaluated yet
    assert len([rule for rule in rules if rule["type"] == "alerting"]) > 10


def test_nginx_finds_gateways_that_were_replaced_when_it_is_told_to_look(stack: Stack, proxy: str) -> None:
    stack.compose("up", "--detach", "--no-build", "--no-deps", "--force-recreate", "--wait", "gateway")
    stack.compose("kill", "--signal", "HUP", "nginx")
    wait_until(lambda: answers(proxy), "nginx does not find the new gateways")


def test_what_the_compose_file_mounts_is_in_the_repository() -> None:
    services = yaml.safe_load(COMPOSE_FILE.read_text())["services"]
    mounted = [
        source
        for service in services.values()
        for source, _, _ in (volume.partition(":") for volume in service.get("volumes", ()))
        if source.startswith("..")
    ]
    assert len(mounted) == 4
    for source in mounted:
        assert any((Path(COMPOSE_FILE).parent / source).iterdir())
    pinned = [each["image"] for each in services.values() if "build" not in each]
    assert len(pinned) == 4
    assert all(re.search(r":v?\d+\.\d+\.\d+[\w.-]*\}$", image) for image in pinned)
