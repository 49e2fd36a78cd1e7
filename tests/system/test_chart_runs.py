"""The chart's pods, run as containers with the rights, variables and files that Kubernetes gives them."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart import Object, container, pods, render, volumes
from docker_engine import Engine

from sfllm.api_keys import key_line, new_key
from sfllm.link_keys import kubernetes_secret, make_link_keys

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

NAMES = "sfllm-test-chart"
PATIENCE_SECONDS = 120.0
KEY = new_key()
METRICS = (
    "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:9090/metrics').read().decode())"
)
VALUES: dict[str, Any] = {
    "models": [{"name": "mock", "model": "mock", "servedNames": ["mock"], "env": {"SFLLM_MOCK": "true"}}]
}


class Release:
    """A container for each Deployment of a rendered chart, in a network where Services' names are theirs."""

    def __init__(self, docker: Engine, images: dict[str, str], secrets: Path) -> None:
        self.docker = docker
        self._images, self._secrets = images, secrets
        self.names: list[str] = []
        docker.run("network", "create", NAMES)

    def start(self, pod: Object) -> None:
        """As the kubelet would: its user, no capabilities, a root file system that cannot be written."""
        only, security = container(pod), pod["spec"]["securityContext"]
        name = f"{NAMES}-{only['name']}"
        self.names.append(name)
        assert only["securityContext"]["readOnlyRootFilesystem"]
        flags = ["--read-only", "--user", f"{security['runAsUser']}:{security['runAsGroup']}"]
        flags += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--init"]
        flags += ["--network", NAMES, "--network-alias", f"llm-sfllm-{only['name']}"]
        flags += [part for each in only["env"] for part in ("--env", f"{each['name']}={each['value']}")]
        for mount in only["volumeMounts"]:
            volume = volumes(pod)[mount["name"]]
            if "secret" in volume:
                folder = self._secret(only["name"], volume["secret"], security["fsGroup"])
                flags += ["--volume", f"{folder}:{mount['mountPath']}:ro"]
            else:
                flags += ["--tmpfs", mount["mountPath"]]
        if only["name"] == "gateway":
            flags += ["--publish", "127.0.0.1::8081"]
        image = only["image"].partition(":")[0]
        self.docker.run(
            "run", "--detach", "--name", name, *flags, image, *only.get("args", ()), **self._images
        )

    def _secret(self, service: str, secret: Object, group: int) -> Path:
        """The files of a secret as a volume has them: root's, readable for the pod's group."""
        folder = self._secrets / f"{service}-{secret['secretName']}"
        folder.mkdir()
        folder.chmod(0o755)
        source = self._secrets / secret["secretName"]
        every = [{"key": file.name, "path": file.name} for file in source.iterdir()]
        for item in secret.get("items", every):
            file = folder / item["path"]
            file.write_text((source / item["key"]).read_text())
            file.chmod(secret["defaultMode"])
            os.chown(file, 0, group)
        return folder

    def wait_ready(self, service: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        probe = ("exec", f"{NAMES}-{service}", "sh", "-c", "python3 -m sfllm.probe /ready || echo no")
        while "200 OK" not in (told := self.docker.run(*probe).stdout):
            assert time.monotonic() < deadline, f"{service}: {told}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(self.docker.run("logs", "--tail", "30", name).stdout for name in self.names)

    def close(self) -> None:
        for name in self.names:
            self.docker.run("rm", "--force", "--volumes", name)
        self.docker.run("network", "rm", NAMES)


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """The two secrets that the chart asks for, made by the commands that the guide names."""
    make_link_keys(tmp_path / "made")
    links = yaml.safe_load(kubernetes_secret(tmp_path / "made", "sfllm-links"))["stringData"]
    folder = tmp_path / "secrets"
    for name, files in (("sfllm-links", links), ("sfllm-api-keys", {"keys.txt": key_line("a", KEY)})):
        (folder / name).mkdir(parents=True)
        for key, text in files.items():
            (folder / name / key).write_text(text)
    for parent in (folder, *tmp_path.parents):
        if parent != Path("/") and parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o011)  # for the containers' user
    return folder


@pytest.fixture
def release(docker: Engine, images: dict[str, str], secrets: Path) -> Iterator[Release]:
    made = Release(docker, images, secrets)
    try:
        yield made
    finally:
        made.close()


def status(url: str, key: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_pods_of_the_chart_serve_with_the_keys_of_its_secrets(release: Release) -> None:
    for pod in pods(render(VALUES)).values():
        release.start(pod)
    for service in ("scheduler", "worker", "gateway"):
        release.wait_ready(service)
        metrics = release.docker.run("exec", f"{NAMES}-{service}", "python3", "-c", METRICS).stdout
        assert "sfllm:links_encrypted 1.0" in metrics, service
    address = release.docker.run("port", f"{NAMES}-gateway", "8081").stdout.splitlines()[0]
    assert status(f"http://{address}/v1/models") == 401
    assert status(f"http://{address}/v1/models", KEY) == 200
    # What preStop runs is in the image.
    release.docker.run("exec", f"{NAMES}-gateway", "sleep", "0")
