"""How much memory the KV cache gets, and which device and number format the model runs in."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

CPU_CACHE_BYTES = 4 * 2**30
"""Unless asked for more, a CPU worker leaves the rest of a newcomer's machine alone."""

USUAL_MEM_FRACTION = {"cuda": 0.9, "cpu": 0.5}
"""What a GPU worker needs besides was measured and is not part of it, and it has the GPU for itself."""

USUAL_STEP_TOKENS = {"cuda": 2048, "cpu": 512}
"""Enough to keep a device's products busy. More makes decodes wait longer for the prompts beside them."""

LARGEST_AUTOMATIC_BATCH = 256
TYPICAL_SEQUENCE_TOKENS = 512
"""What a sequence is expected to take of the cache; longer ones make the batch smaller by themselves."""

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def choose_device(name: str) -> torch.device:
    """The device that a setting means; "auto" is a GPU when one can be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch finds no usable GPU")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> str:
    """The number format that a setting means. On CPUs bfloat16 pays only with instructions for it."""
    if name != "auto" or device.type == "cuda":
        return name
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def cache_blocks(
    *,
    device: torch.device,
    bytes_per_block: int,
    block_size: int,
    cache_tokens: int | None,
    mem_fraction: float | None,
    useful_tokens: int,
    reserved_bytes: int = 0,
) -> int:
    """Blocks of the cache, without the padding block.

    `cache_tokens` decides when given; otherwise `mem_fraction` of the memory that is free besides
    `reserved_bytes`, but no more than `useful_tokens`, which the largest batch of the longest sequences
    would fill. Raises ValueError when nothing is left.
    """
    if cache_tokens is not None:
        return max(1, -(-cache_tokens // block_size))
    free = free_bytes(device)
    if free < reserved_bytes:
        raise ValueError(
            f"{free / 2**20:.0f} MiB are free on {device} beside the weights, and steps take "
            f"{reserved_bytes / 2**20:.0f}: a smaller --max-batch-size or --max-context-length takes less"
        )
    budget = int((free - reserved_bytes) * (mem_fraction or USUAL_MEM_FRACTION[device.type]))
    if device.type == "cpu":
        budget = min(budget, CPU_CACHE_BYTES)
    return max(1, min(budget // bytes_per_block, -(-useful_tokens // block_size)))


def automatic_batch_size(cache_tokens: int, max_model_len: int) -> int:
    """The most sequences in a step, so that a cache of that size is neither idle nor fought over."""
    expected = min(TYPICAL_SEQUENCE_TOKENS, max_model_len)
    return max(1, min(LARGEST_AUTOMATIC_BATCH, cache_tokens // expected))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now; in a container, what its limit leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _meminfo_available()
    if _CGROUP_LIMIT.is_file() and (limit := _CGROUP_LIMIT.read_text().strip()) != "max":
        available = min(available, int(limit) - int(_CGROUP_USED.read_text()))
    return max(0, available)


class CudaMemory:
    """Memory of a GPU, as its driver counts it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        """Bytes that are free now, whoever uses the others."""
        return free_bytes(self._device)

    def release(self) -> None:
        """Give back what torch caches and nobody uses."""
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")
