"""Which of the GPUs that workers may use each worker of `sfllm serve` gets."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Literal

from sfllm.gpus import VISIBLE, GpuListError, list_gpus, visible_gpus


def find_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """What to set `CUDA_VISIBLE_DEVICES` to for each GPU that a process with this environment sees."""
    try:
        return visible_gpus(list_gpus(environ), environ.get(VISIBLE))
    except GpuListError as error:
        print(f"no GPU is used: {error}", file=sys.stderr, flush=True)
        return ()


def count_workers(wanted: int | Literal["auto"], gpus: Sequence[str]) -> int:
    """How many workers to run: "auto" is one for each GPU, or one on a machine without."""
    return wanted if wanted != "auto" else max(1, len(gpus))


def gpu_of(worker: int, workers: int, gpus: Sequence[str]) -> dict[str, str]:
    """The environment that gives one of several workers its GPU; more workers than GPUs share them in turn.

    A worker that is alone sees what the user lets it see.
    """
    return {VISIBLE: gpus[worker % len(gpus)]} if gpus and workers > 1 else {}
