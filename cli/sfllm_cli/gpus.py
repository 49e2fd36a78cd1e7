"""The GPUs that workers may use, found without loading CUDA: by `nvidia-smi` and `CUDA_VISIBLE_DEVICES`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

VISIBLE = "CUDA_VISIBLE_DEVICES"

_LIST_SECONDS = 60.0
"""Without a daemon that keeps it loaded, the driver is initialised by the first who asks: for seconds."""

_LINE = re.compile(r"^GPU \d+: .*\(UUID: (GPU-[0-9a-fA-F-]+)\)")


def find_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """What to set `CUDA_VISIBLE_DEVICES` to for each GPU that a process with this environment sees."""
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return ()
    try:
        listed = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=_LIST_SECONDS, check=True, env=environ
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no GPU is used, because nvidia-smi failed: {error}", file=sys.stderr, flush=True)
        return ()
    return visible_gpus(parse_listing(listed.stdout), environ.get(VISIBLE))


def parse_listing(text: str) -> tuple[str, ...]:
    """The UUIDs of the GPUs in what `nvidia-smi -L` prints, in its order."""
    return tuple(match[1] for line in text.splitlines() if (match := _LINE.match(line)))


def visible_gpus(uuids: Sequence[str], visible: str | None) -> tuple[str, ...]:
    """Those of the GPUs `uuids` that a value of `CUDA_VISIBLE_DEVICES` shows, each as it is named there.

    As CUDA reads it: numbers or beginnings of UUIDs, ended by the first that names no GPU. Parts of a GPU
    (`MIG-...`) are taken as they are. Without a value all are shown, by their UUIDs, which mean the same
    whatever order CUDA counts in.
    """
    if visible is None:
        return tuple(uuids)
    shown: list[str] = []
    for entry in (part.strip() for part in visible.split(",")):
        exists = (
            int(entry) < len(uuids)
            if entry.isdecimal()
            else entry.startswith("MIG-") or (bool(entry) and any(uuid.startswith(entry) for uuid in uuids))
        )
        if not exists or entry in shown:
            break
        shown.append(entry)
    return tuple(shown)


def count_workers(wanted: int | Literal["auto"], gpus: Sequence[str]) -> int:
    """How many workers to run: "auto" is one for each GPU, or one on a machine without."""
    return wanted if wanted != "auto" else max(1, len(gpus))


def gpu_of(worker: int, workers: int, gpus: Sequence[str]) -> dict[str, str]:
    """The environment that gives one of several workers its GPU; more workers than GPUs share them in turn.

    A worker that is alone sees what the user lets it see.
    """
    return {VISIBLE: gpus[worker % len(gpus)]} if gpus and workers > 1 else {}
