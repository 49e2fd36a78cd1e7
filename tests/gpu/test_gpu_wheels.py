"""What is carried to a GPU machine without a network."""

from __future__ import annotations

from pathlib import Path

from bench import gpu_wheels

PROJECT = (gpu_wheels.ROOT / "pyproject.toml").read_text()


def test_everything_that_serving_imports_is_carried_and_nothing_that_torch_brings() -> None:
    wanted = gpu_wheels.required(gpu_wheels.own_requirements(PROJECT), "3.12", gpu_wheels.PRESENT)
    services = {"pyzmq", "msgspec", "fastapi", "starlette", "uvicorn", "httptools", "uvloop", "structlog"}
    assert services | {"pydantic-core", "aiohttp", "yarl", "gguf", "nvidia-ml-py", "configargparse"} <= wanted
    assert not wanted & {"torch", "triton", "transformers", "numpy", "sympy", "sfllm", "pytest"}


def test_every_carried_package_has_a_pinned_version() -> None:
    wanted = gpu_wheels.required(gpu_wheels.own_requirements(PROJECT), "3.12", gpu_wheels.PRESENT)
    pins = gpu_wheels.pinned((gpu_wheels.ROOT / "constraints.txt").read_text())
    assert wanted <= pins.keys()


def test_what_the_other_machine_lists_as_installed_is_not_carried() -> None:
    listing = "Package    Version\n---------- -------\nPyYAML     6.0.1\nuvloop==0.21\nhf_xet 1.0\n"
    assert gpu_wheels.names_in(listing) == {"pyyaml", "uvloop", "hf-xet"}
    own = gpu_wheels.own_requirements(PROJECT)
    wanted = gpu_wheels.required(own, "3.12", gpu_wheels.PRESENT | gpu_wheels.names_in(listing))
    assert "pyyaml" not in wanted
    assert "uvloop" not in wanted


def test_the_instructions_name_the_wheels_and_every_source_folder() -> None:
    text = gpu_wheels.instructions(gpu_wheels.ROOT / "build" / "wheels")
    assert "--no-index" in text
    assert "build/wheels/*.whl" in text
    folders = [part for line in text.splitlines() if "PYTHONPATH" in line for part in line.split(":")[1:]]
    assert {Path(folder).name for folder in folders} == {"shared", "gateway", "scheduler", "worker", "cli"}
