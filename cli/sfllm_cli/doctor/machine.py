"""What this machine has: disk for caches, GPUs and their driver, torch's build, native kernels.

Nothing is loaded for it, neither torch nor CUDA: files and `nvidia-smi` tell enough.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sfllm.gpus import parse_listing
from sfllm.model_files import cache_directory

SMI_SECONDS = 30.0

_CUDA = re.compile(r"CUDA (?:UMD )?Version\s*:\s*(\d+)\.(\d+)")
_DRIVER = re.compile(r"Driver Version\s*:\s*([\d.]+)")
_BUILD = re.compile(r"^(__version__|cuda)\b[^=]*=\s*(?:'([^']*)'|None)", re.MULTILINE)


class Disk(NamedTuple):
    """A directory that caches need, and the bytes free where it lies; or why it cannot be written."""

    path: str
    free_bytes: int
    fault: str = ""


class Gpus(NamedTuple):
    """`names` are the GPUs that the driver shows; `fault` is why it shows none although there is a device.

    `cuda` is the newest CUDA that the driver runs.
    """

    names: tuple[str, ...] = ()
    driver: str = ""
    cuda: tuple[int, int] | None = None
    fault: str = ""


class Torch(NamedTuple):
    """The installed build; `cuda` is None of a build for CPUs."""

    version: str
    cuda: tuple[int, int] | None


class Kernels(NamedTuple):
    """Whether native kernels for CPUs were built here, and the compiler that builds them, if there is one."""

    built: bool
    compiler: str


class Machine(NamedTuple):
    """All of it; `torch` is None where it is not installed: on machines without workers."""

    disks: tuple[Disk, ...]
    gpus: Gpus
    torch: Torch | None
    kernels: Kernels


def look_around(environ: Mapping[str, str]) -> Machine:
    """What is there now."""
    cache = cache_directory()
    return Machine(
        disks=(_disk(cache), _disk(Path(tempfile.gettempdir()))),
        gpus=find_driver(environ),
        torch=_torch(),
        kernels=Kernels(
            any((cache / "kernels").glob("sfllm-*.so")),
            shutil.which(environ.get("CXX", "g++"), path=environ.get("PATH")) or "",
        ),
    )


def _disk(path: Path) -> Disk:
    there = next((parent for parent in (path, *path.parents) if parent.exists()), Path("/"))
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Disk(str(path), 0, error.strerror or str(error))
    return Disk(str(path), free, "" if os.access(there, os.W_OK | os.X_OK) else "it cannot be written")


def find_driver(environ: Mapping[str, str], devices: Path = Path("/dev")) -> Gpus:
    """The GPUs as `nvidia-smi` shows them; `devices` is where the kernel shows what it has."""
    present = any(devices.glob("nvidia[0-9]*"))
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return Gpus(fault="there is a device file of a GPU, and no nvidia-smi" if present else "")
    try:
        listed, told = (_run(program, *flags, environ=environ) for flags in (("-L",), ("-q", "-d", "MEMORY")))
    except subprocess.CalledProcessError as error:
        return Gpus(fault=f"nvidia-smi: {_first_line(error.stdout, error.stderr)}")
    except (OSError, subprocess.SubprocessError) as error:
        return Gpus(fault=f"nvidia-smi: {error}")
    driver, cuda = _DRIVER.search(told), _CUDA.search(told)
    return Gpus(
        tuple(gpu.uuid for gpu in parse_listing(listed)),
        driver[1] if driver else "",
        (int(cuda[1]), int(cuda[2])) if cuda else None,
    )


def _run(program: str, *flags: str, environ: Mapping[str, str]) -> str:
    return subprocess.run(
        [program, *flags], capture_output=True, text=True, timeout=SMI_SECONDS, check=True, env=environ
    ).stdout


def _first_line(*texts: str) -> str:
    lines = "\n".join(texts).strip().splitlines()
    return lines[0] if lines else "failed without a word"


def _torch() -> Torch | None:
    """The installed build by the file that it is told in: importing it would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return parse_build(Path(spec.origin).with_name("version.py").read_text(encoding="utf-8"))


def parse_build(text: str) -> Torch:
    """What torch's `version.py` says."""
    told = {match[1]: match[2] for match in _BUILD.finditer(text)}
    numbers = re.match(r"(\d+)\.(\d+)", told.get("cuda") or "")
    return Torch(told.get("__version__") or "?", (int(numbers[1]), int(numbers[2])) if numbers else None)
