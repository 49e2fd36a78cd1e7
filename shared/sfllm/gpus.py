"""The GPUs of a machine and those of them that a process may use, found without loading CUDA.

`nvidia-smi -L` names them, `CUDA_VISIBLE_DEVICES` chooses among them. A GPU that is partitioned (MIG) is
used by its parts, each of which is to CUDA a device of its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
PART = "MIG-"

_LIST_SECONDS = 60.0
"""Without a daemon that keeps it loaded, the driver is initialised by the first who asks: for seconds."""

_GPU = re.compile(r"^GPU \d+: (.*?) *\(UUID: (GPU-[0-9a-fA-F-]+)\)")
_PART = re.compile(r"^\s+MIG .*\(UUID: (MIG-[^)\s]+)\)")


class GpuListError(Exception):
    """`nvidia-smi` is there and does not tell the GPUs; the text says why."""


class Gpu(NamedTuple):
    """A GPU as the driver names it; `parts` are the UUIDs of what it is partitioned into, if it is."""

    uuid: str
    model: str
    parts: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[str, ...]:
        """What processes can be given of it: its parts, or else itself."""
        return self.parts or (self.uuid,)


def list_gpus(environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """The GPUs of this machine or container; none where there is no `nvidia-smi`. Raises GpuListError."""
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return ()
    try:
        listed = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=_LIST_SECONDS, check=True, env=environ
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip().splitlines()
        raise GpuListError(f"nvidia-smi failed: {said[0] if said else error}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise GpuListError(f"nvidia-smi failed: {error}") from error
    return parse_listing(listed.stdout)


def parse_listing(text: str) -> tuple[Gpu, ...]:
    """The GPUs in what `nvidia-smi -L` prints, in its order."""
    gpus: list[Gpu] = []
    for line in text.splitlines():
        if gpu := _GPU.match(line):
            gpus.append(Gpu(gpu[2], gpu[1]))
        elif (part := _PART.match(line)) and gpus:
            gpus[-1] = gpus[-1]._replace(parts=(*gpus[-1].parts, part[1]))
    return tuple(gpus)


def visible_gpus(gpus: Sequence[Gpu], visible: str | None) -> tuple[str, ...]:
    """Those of the GPUs that a value of `CUDA_VISIBLE_DEVICES` shows, each as it is named there.

    As CUDA reads it: numbers or beginnings of UUIDs, ended by the first that names no GPU. Parts of a GPU
    (`MIG-...`) are taken as they are. Without a value all are shown, by the UUIDs of their devices, which
    mean the same whatever order CUDA counts in.
    """
    if visible is None:
        return tuple(device for gpu in gpus for device in gpu.devices)
    shown: list[str] = []
    for entry in (part.strip() for part in visible.split(",")):
        exists = (
            int(entry) < len(gpus)
            if entry.isdecimal()
            else entry.startswith(PART) or (bool(entry) and any(gpu.uuid.startswith(entry) for gpu in gpus))
        )
        if not exists or entry in shown:
            break
        shown.append(entry)
    return tuple(shown)


def devices_of(gpus: Sequence[Gpu], names: Sequence[str], order: str | None) -> tuple[str, ...]:
    """The UUIDs of the devices that entries of `CUDA_VISIBLE_DEVICES` name, see `visible_gpus`.

    `order` is the value of `CUDA_DEVICE_ORDER`. Raises ValueError where a number may mean one GPU to CUDA,
    which counts the fastest first unless told otherwise, and another one to `nvidia-smi`.
    """
    same_order = order == "PCI_BUS_ID" or len({gpu.model for gpu in gpus}) <= 1
    found: list[str] = []
    for name in names:
        if name.startswith(PART):
            found.append(name)
        elif not name.isdecimal():
            found += next(gpu for gpu in gpus if gpu.uuid.startswith(name)).devices
        elif same_order:
            found += gpus[int(name)].devices
        else:
            raise ValueError(
                f"{VISIBLE}: the GPUs here are not all alike, and CUDA may count them in another order than "
                f"nvidia-smi: name them by UUID (nvidia-smi -L), or set {ORDER}=PCI_BUS_ID"
            )
    return tuple(dict.fromkeys(found))
