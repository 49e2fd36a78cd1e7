"""Writes the lock files of the images anew: `make image-locks`.

Each holds everything that one image installs, with versions from constraints.txt and the hashes of every file
that the index has of them, so that a build can install nothing else. torch's build for CPUs is in no public
index but its own: give `--index` or `--find-links`, uv's options, which count for that lock alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADER = "# Written by `make image-locks`: everything that an image installs, with the hashes of its files.\n"
# The oldest Python that an image may have, and what runs in containers.
PLATFORM = ("--python-version", "3.11", "--python-platform", "linux")


@dataclass(frozen=True)
class Lock:
    """One lock file: which extras of sfllm it covers, and how torch is built in it."""

    path: str
    extras: tuple[str, ...]
    torch: str = ""


LOCKS = (
    Lock("services/gateway/requirements.lock", ("gateway", "tracing")),
    Lock("services/scheduler/requirements.lock", ("scheduler", "tracing")),
    Lock("services/worker/requirements-cpu.lock", ("worker", "tracing"), torch="cpu"),
    Lock("services/worker/requirements-cuda.lock", ("worker", "gpu", "tracing"), torch="cuda"),
)
BUILD_LOCK = "deploy/images/build.lock"


def constraints_of(lock: Lock, constraints: str) -> str:
    """The versions that a lock must have, of those that sfllm is tested with."""
    if lock.torch == "cpu":
        return re.sub(r"^(torch==\S+)$", r"\1+cpu", constraints, flags=re.MULTILINE)
    if lock.torch == "cuda":
        # The triton that proves the kernels without a GPU is another one than torch's CUDA build brings.
        return re.sub(r"^triton==.*\n", "", constraints, flags=re.MULTILINE)
    return constraints


def resolve(target: str, sources: list[str], constraints: str, options: list[str]) -> None:
    """Let uv write one lock file. Raises `CalledProcessError` where there is no such set of versions."""
    with tempfile.TemporaryDirectory() as directory:
        versions, locked = Path(directory, "constraints.txt"), Path(directory, "lock.txt")
        versions.write_text(constraints)
        command = ["uv", "pip", "compile", "--quiet", "--no-config", "--no-header", "--no-annotate"]
        command += ["--generate-hashes", *PLATFORM, "--constraint", str(versions)]
        command += ["--output-file", str(locked), *options, *sources]
        subprocess.run(command, cwd=ROOT, check=True)
        (ROOT / target).write_text(HEADER + locked.read_text())
    print(target)


def main() -> None:
    """Write all lock files; the arguments are uv's, for the lock that has torch for CPUs."""
    options = sys.argv[1:]
    constraints = (ROOT / "constraints.txt").read_text()
    for lock in LOCKS:
        extras = [part for extra in lock.extras for part in ("--extra", extra)]
        resolve(
            lock.path,
            ["pyproject.toml", *extras],
            constraints_of(lock, constraints),
            options if lock.torch == "cpu" else [],
        )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as backend:
        backend.write("\n".join(project["build-system"]["requires"]))
        backend.flush()
        resolve(BUILD_LOCK, [backend.name], constraints, [])


if __name__ == "__main__":
    main()
