"""A program `nvidia-smi` that lists GPUs which are not there: the only thing that a test must make up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def uuid_of(letter: str) -> str:
    """A GPU's UUID that is easy to tell from others."""
    return f"GPU-{letter * 8}-0000-1111-2222-333344445555"


def listing(uuids: Sequence[str], model: str = "NVIDIA H100 80GB HBM3") -> str:
    """What `nvidia-smi -L` prints of whole GPUs."""
    return "".join(f"GPU {number}: {model} (UUID: {uuid})\n" for number, uuid in enumerate(uuids))


def write_tool(directory: Path, script: str) -> dict[str, str]:
    """Write the program; an environment in which it is found."""
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{directory}:/usr/bin:/bin"}


def write_listing(directory: Path, text: str) -> dict[str, str]:
    """As `write_tool`, for a program that prints this for `-L` and fails otherwise."""
    return write_tool(directory, f"[ \"$1\" = -L ] && cat <<'END'\n{text}END")
