"""What the images are built from: all that the project asks for, pinned to what it is tested with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {
    "gateway/requirements.lock": ("gateway", "tracing"),
    "scheduler/requirements.lock": ("scheduler", "tracing"),
    "worker/requirements-cpu.lock": ("worker", "tracing"),
    "worker/requirements-cuda.lock": ("worker", "gpu", "tracing"),
}
DOCKERFILES = [ROOT / "services" / name / "Dockerfile" for name in ("gateway", "scheduler", "worker")]
HINT = "write the locks anew: make image-locks"


def locked(path: Path) -> dict[str, str]:
    """The version of each package in a lock file."""
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+) \\$", path.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_all_that_the_project_asks_for(name: str) -> None:
    wanted = [*PROJECT["dependencies"]]
    for extra in LOCKS[name]:
        wanted += PROJECT["optional-dependencies"][extra]
    versions = locked(ROOT / "services" / name)
    for requirement in map(Requirement, wanted):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is missing; {HINT}"
        assert requirement.specifier.contains(version), f"{requirement.name} is {version}; {HINT}"


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_the_versions_that_sfllm_is_tested_with(name: str) -> None:
    text = (ROOT / "constraints.txt").read_text()
    tested = {
        canonicalize_name(pin): version for pin, version in re.findall(r"^(\S+)==(\S+)$", text, re.MULTILINE)
    }
    if name == "worker/requirements-cuda.lock":
        del tested["triton"]  # torch for CUDA comes with a triton of its own
    for package, version in locked(ROOT / "services" / name).items():
        assert version.removesuffix("+cpu") == tested.get(package, version), f"{package}; {HINT}"


@pytest.mark.parametrize("path", [*(ROOT / "services" / name for name in LOCKS)], ids=LOCKS)
def test_no_package_is_locked_without_a_hash(path: Path) -> None:
    assert re.fullmatch(r"(#.*\n)?(\S+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n)+", path.read_text()), (
        f"something in it is not `name==version --hash=...`; {HINT}"
    )


def test_gateway_and_scheduler_have_no_torch_and_only_one_worker_has_cuda() -> None:
    packages = {name: locked(ROOT / "services" / name) for name in LOCKS}
    assert {name for name in LOCKS if "torch" in packages[name]} == {
        "worker/requirements-cpu.lock",
        "worker/requirements-cuda.lock",
    }
    assert {
        name for name in LOCKS if any("nvidia" in each or each == "triton" for each in packages[name])
    } == {"worker/requirements-cuda.lock"}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_an_image_is_pinned_labelled_watched_and_not_root(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^ARG BASE_IMAGE=\S+:[\w.-]+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert f"ARG VERSION={PROJECT['version']}\n" in text
    for label in ("title", "description", "version", "revision", "source", "licenses"):
        assert f"org.opencontainers.image.{label}=" in text
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001"]
    assert "HEALTHCHECK " in text
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${BASE_IMAGE}"] * 2
    for installation in re.findall(r"pip \S*.*? install .*", text):
        assert "--require-hashes" in installation or "--no-index" in installation
