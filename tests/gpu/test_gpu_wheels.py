"""What is carried to a GPU machine without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

from bench import gpu_wheels

PROJECT = (gpu_wheels.ROOT / "pyproject.toml").read_text()


def test_everything_that_serving_imports_is_carried_and_nothing_that_torch_brings() -> None:
    wanted = gpu_wheels.required(gpu_wheels.carried_requirements(PROJECT), "3.12", gpu_wheels.PRESENT)
    services = {"pyzmq", "msgspec", "fastapi", "starlette", "uvicorn", "httptools", "uvloop", "structlog"}
    assert services | {"pydantic-core", "aiohttp", "yarl", "gguf", "nvidia-ml-py", "configargparse"} <= wanted
    assert not wanted & {"torch", "triton", "transformers", "numpy", "sympy", "sfllm", "ruff"}


def test_every_carried_package_has_a_pinned_version() -> None:
    wanted = gpu_wheels.required(gpu_wheels.carried_requirements(PROJECT), "3.12", gpu_wheels.PRESENT)
    pins = gpu_wheels.pinned((gpu_wheels.ROOT / "constraints.txt").read_text())
    assert wanted <= pins.keys()


def test_what_the_other_machine_lists_as_installed_is_not_carried() -> None:
    listing = "Package    Version\n---------- -------\nPyYAML     6.0.1\nuvloop==0.21\nhf_xet 1.0\n"
    assert gpu_wheels.names_in(listing) == {"pyyaml", "uvloop", "hf-xet"}
    own = gpu_wheels.carried_requirements(PROJECT)
    wanted = gpu_wheels.required(own, "3.12", gpu_wheels.PRESENT | gpu_wheels.names_in(listing))
    assert "pyyaml" not in wanted
    assert "uvloop" not in wanted


def test_the_instructions_name_the_wheels_and_every_source_folder_is_on_the_path() -> None:
    text = gpu_wheels.instructions(gpu_wheels.ROOT / "build" / "wheels")
    assert "WHEELS=build/wheels . bench/gpu_bench/environment.sh" in text
    script = (gpu_wheels.ROOT / "bench" / "gpu_bench" / "environment.sh").read_text()
    [path] = re.findall(r'^export PYTHONPATH="(.*)"', script, re.MULTILINE)
    folders = {Path(folder).name for folder in path.split(":")[1:]}
    assert folders == {"shared", "gateway", "scheduler", "worker", "cli"}
    assert "--no-index" in script


def test_wheels_are_unpacked_once_where_they_replace_nothing(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    kind = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    metadata = "Metadata-Version: 2.1\nName: carried\nVersion: 1\n"
    with zipfile.ZipFile(wheels / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "FOUND = 'from the wheel'\n")
        wheel.writestr("carried-1.dist-info/METADATA", metadata)
        wheel.writestr("carried-1.dist-info/WHEEL", kind)
        wheel.writestr("carried-1.dist-info/RECORD", "")
    script = "import carried, sfllm; print(carried.FOUND, sfllm.__file__)"
    command = f". bench/gpu_bench/environment.sh && python3 -c '{script}'"
    environment = os.environ | {"WHEELS": str(wheels), "SITE": str(site)}
    for _ in range(2):
        process = subprocess.run(
            ["bash", "-c", command], cwd=gpu_wheels.ROOT, env=environment, capture_output=True, text=True,
            timeout=200, check=True,
        )  # fmt: skip
        last = process.stdout.splitlines()[-1]
        assert last == f"from the wheel {gpu_wheels.ROOT / 'shared' / 'sfllm' / '__init__.py'}"
        shutil.rmtree(wheels, ignore_errors=True)
