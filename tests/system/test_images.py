"""The images themselves: small, the same whenever built, and content with few rights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from base_image import ROOT, make_slim_image
from docker_engine import Engine, EngineUnavailableError
from image_layers import added_files, size_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

TOOLS = ROOT / ".venv-images" / "bin"
REVISION = "0123456789abcdef"
LIMIT_MEGABYTES = 250
# In no image, nor with any rights: what a hardened cluster may give.
STRANGER = "54321:54321"
INSECURE = ("--env", "SFLLM_INSECURE_LINKS=1", "--env", "SFLLM_ALLOW_ANONYMOUS=1")


@pytest.fixture(scope="module")
def slim(docker: Engine, docker_directory: Path) -> str:
    """A base of the size of the one that the Dockerfiles name."""
    try:
        return make_slim_image(docker, docker_directory)
    except EngineUnavailableError as error:
        pytest.skip(f"NO IMAGES WERE TESTED: {error}")


@pytest.fixture(scope="module")
def built(docker: Engine, slim: str, docker_directory: Path) -> Iterator[dict[str, str]]:
    """Gateway and scheduler on the slim base, and the scheduler once more, each built anew."""
    names = {
        "gateway": "sfllm-test-gateway",
        "scheduler": "sfllm-test-scheduler",
        "again": "sfllm-test-scheduler-again",
    }
    for key, image in names.items():
        _build(docker, docker_directory, slim, "gateway" if key == "gateway" else "scheduler", image)
    yield names
    docker.run("rmi", "--force", *names.values())


def _build(engine: Engine, directory: Path, base: str, service: str, image: str) -> None:
    # Compose brings a builder of its own; not every docker client has one.
    build = {
        "context": str(ROOT),
        "dockerfile": f"services/{service}/Dockerfile",
        "network": "host",
        "args": {"BASE_IMAGE": base, "REVISION": REVISION},
    }
    file = directory / "image.yaml"
    file.write_text(json.dumps({"services": {"image": {"image": image, "build": build}}}))
    engine.run_compose("--file", str(file), "build", "--no-cache", seconds=600)


@pytest.mark.parametrize("service", ["gateway", "scheduler"])
def test_images_without_torch_are_small(docker: Engine, built: dict[str, str], service: str) -> None:
    assert size_of(docker, built[service]) < LIMIT_MEGABYTES


def test_two_builds_give_the_same_files(
    docker: Engine, built: dict[str, str], slim: str, docker_directory: Path
) -> None:
    first, second = (
        added_files(docker, built[name], slim, docker_directory) for name in ("scheduler", "again")
    )
    assert len(first) > 1000
    assert any(name.endswith(".pyc") for name in first)
    assert {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)} == set()


@pytest.mark.parametrize("service", ["gateway", "scheduler"])
def test_labels_say_what_an_image_is_and_where_it_comes_from(
    docker: Engine, built: dict[str, str], service: str
) -> None:
    labels = json.loads(docker.run("inspect", "--format", "{{json .Config.Labels}}", built[service]).stdout)
    prefix = "org.opencontainers.image."
    found = {name.removeprefix(prefix): value for name, value in labels.items() if name.startswith(prefix)}
    assert (found["title"], found["revision"], found["licenses"]) == (f"sfllm-{service}", REVISION, "MIT")
    assert {"description", "source", "version"} <= found.keys()


def test_an_image_has_nothing_that_installs_packages(docker: Engine, built: dict[str, str]) -> None:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('pip') is not None)"
    docker.run("run", "--rm", "--entrypoint", "/opt/sfllm/bin/python3", built["gateway"], "-c", code)


@contextmanager
def running(engine: Engine, *arguments: str) -> Iterator[str]:
    """A container with the fewest rights that there are, asked for its health every second."""
    rights = ("--read-only", "--user", STRANGER, "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    options = ("--detach", "--network", "none", "--health-interval", "1s", *rights, *INSECURE)
    container = engine.run("run", *options, *arguments).stdout.strip()
    try:
        yield container
    finally:
        engine.run("rm", "--force", container)


def until_healthy(engine: Engine, container: str) -> None:
    deadline = time.monotonic() + 90
    state = ""
    while state != "healthy":
        assert time.monotonic() < deadline, (state, engine.run("logs", container))
        state = engine.run("inspect", "--format", "{{.State.Health.Status}}", container).stdout.strip()
        time.sleep(0.2)


@pytest.mark.parametrize("service", ["gateway", "scheduler"])
def test_a_service_needs_no_disk_no_rights_and_no_user_of_its_own(
    docker: Engine, built: dict[str, str], service: str
) -> None:
    with running(docker, built[service]) as container:
        until_healthy(docker, container)
        # As process 1, without an init in front.
        docker.run("stop", "--time", "30", container)
        assert docker.run("inspect", "--format", "{{.State.ExitCode}}", container).stdout.strip() == "0"


def test_a_worker_needs_no_more_than_its_cache(docker: Engine, images: dict[str, str]) -> None:
    with running(docker, "--tmpfs", "/tmp", "sfllm-worker", "--mock") as container:
        until_healthy(docker, container)
        code = "import os, pathlib, torch; (pathlib.Path(os.environ['SFLLM_CACHE_DIR']) / 'a').touch()"
        docker.run("exec", container, "python3", "-c", code)
        docker.run("stop", "--time", "30", container)
        assert docker.run("inspect", "--format", "{{.State.ExitCode}}", container).stdout.strip() == "0"


def test_a_user_of_named_volumes_may_write_to_them(docker: Engine, built: dict[str, str]) -> None:
    mounts = ("--volume", "/keys/scheduler", "--volume", "/keys/worker")
    code = "import pathlib; pathlib.Path('/keys/scheduler/a').touch(); pathlib.Path('/keys/worker/a').touch()"
    docker.run(
        "run", "--rm", "--read-only", *mounts, "--entrypoint", "python3", built["scheduler"], "-c", code
    )


@pytest.fixture(scope="module")
def tools() -> Path:
    if not TOOLS.is_dir():
        pytest.skip("NEITHER DOCKERFILES NOR SBOM WERE CHECKED: make test-system makes their tools")
    return TOOLS


@pytest.mark.parametrize("service", ["gateway", "scheduler", "worker"])
def test_hadolint_has_nothing_to_say(tools: Path, service: str) -> None:
    path = ROOT / "services" / service / "Dockerfile"
    found = subprocess.run([tools / "hadolint", path], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_list_of_contents_has_all_that_is_locked_and_the_system(
    docker: Engine, built: dict[str, str], tools: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sbom.json"
    command = [tools / "python", ROOT / "deploy" / "images" / "sbom.py", built["scheduler"], output]
    host = {"DOCKER_HOST": docker.host} if docker.host else {}
    subprocess.run(command, check=True, timeout=300, env={**os.environ, **host})
    document = json.loads(output.read_text())
    component = document["metadata"]["component"]
    assert (document["bomFormat"], component["name"]) == ("CycloneDX", "sfllm-scheduler")
    links = {each["purl"].lower().replace("_", "-").partition("?")[0] for each in document["components"]}
    lock = (ROOT / "services" / "scheduler" / "requirements.lock").read_text()
    locked = {f"pkg:pypi/{name}@{version}" for name, version in re.findall(r"^(\S+)==(\S+) ", lock, re.M)}
    assert locked <= links
    assert any(each.startswith("pkg:deb/debian/libc6@") for each in links)
