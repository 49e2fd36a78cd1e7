"""One GPU for each worker of a host, although every worker sees them all.

Containers of one service are alike: `docker compose up --scale worker=4` shows each of the four every GPU.
So they share a folder with one file for each GPU, and who holds the lock on a GPU's file has the GPU. The
lock is the kernel's (flock): it ends with the process, however it ends, so that no claim outlives its
worker and nothing has to be cleaned up. What the files say is for people.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

import structlog

from sfllm.gpus import ORDER, VISIBLE, Gpu, devices_of, list_gpus, visible_gpus
from sfllm.settings import WorkerSettings

_log = structlog.get_logger()

POLL_SECONDS = 0.2
TELL_SECONDS = 15.0
"""How often a worker that waits says for whom."""

LONGEST_HOLDER = 200


class NoFreeGpuError(Exception):
    """Other workers have every GPU that this one may use, and none ended in time; the text says which."""


def claim_gpu(settings: WorkerSettings, environ: MutableMapping[str, str]) -> str | None:
    """Claim a GPU as the settings say, and let CUDA see no other; its UUID, or None where none is claimed.

    To be called before anything initialises CUDA, which reads `environ`, this process's own, only then.
    Where `--device auto` finds no GPU, CUDA sees none afterwards: what nobody can claim, nobody uses.

    Raises NoFreeGpuError, ValueError where there is none to claim, GpuListError, and OSError when the folder
    cannot be used.
    """
    if not settings.gpu_claims or settings.device == "cpu":
        return None
    gpus = list_gpus(environ)
    wanted = usable_devices(gpus, environ)
    if not wanted:
        found = f"{VISIBLE} shows none of {len(gpus)}" if gpus else "nvidia-smi is not there or lists none"
        if settings.device == "cuda":
            raise ValueError(f"--gpu-claims: there is no GPU to claim: {found}")
        _log.warning("no GPU to claim, so the model runs on the CPU", reason=found)
        environ[VISIBLE] = ""
        return None
    try:
        claimed = _claim(Path(settings.gpu_claims), wanted, settings.gpu_claim_seconds)
    except OSError as error:
        raise OSError(f"--gpu-claims {settings.gpu_claims} cannot be used: {error}") from error
    environ[VISIBLE] = claimed
    return claimed


def usable_devices(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> tuple[str, ...]:
    """The UUIDs of what a process with this environment may claim. Raises ValueError as `devices_of`."""
    return devices_of(gpus, visible_gpus(gpus, environ.get(VISIBLE)), environ.get(ORDER))


def _claim(directory: Path, wanted: Sequence[str], wait_seconds: float) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    told_at = -TELL_SECONDS
    while True:
        holders: dict[str, str] = {}
        for uuid in wanted:
            holder = _take(claim_file(directory, uuid))
            waited = time.monotonic() - started
            if holder is None:
                _log.info("GPU claimed", gpu=uuid, waited_seconds=round(waited, 1))
                return uuid
            holders[uuid] = holder
        if waited >= wait_seconds:
            raise NoFreeGpuError(_refusal(directory, holders, wait_seconds))
        if waited - told_at >= TELL_SECONDS:
            told_at = waited
            _log.warning(
                "every GPU is claimed, waiting", seconds_left=round(wait_seconds - waited, 1), holders=holders
            )
        time.sleep(min(POLL_SECONDS, wait_seconds - waited))


def claim_file(directory: Path, uuid: str) -> Path:
    """The file whose lock is the claim. Parts of old drivers have names with slashes."""
    return directory / uuid.replace("/", "_")


def _take(path: Path) -> str | None:
    """Lock the file for the rest of this process, and return None; or else return who holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)  # Python closes it at an exec
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, LONGEST_HOLDER, 0).decode(errors="replace").strip()
        os.close(descriptor)
        return holder or "a worker that has just started"
    except OSError:
        os.close(descriptor)
        raise
    # A child that only forks would keep the lock when this process has ended.
    os.register_at_fork(after_in_child=lambda: os.close(descriptor))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{_this_process()}\n".encode(), 0)
    return None


def _this_process() -> str:
    """Host name, which in a container is the container's id, process id and time."""
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    return f"pid {os.getpid()} on {socket.gethostname()} since {now} UTC"


def _refusal(directory: Path, holders: Mapping[str, str], wait_seconds: float) -> str:
    held = "; ".join(f"{uuid} by {holder}" for uuid, holder in holders.items())
    return (
        f"no GPU became free within --gpu-claim-seconds {wait_seconds:g} (claims in {directory}): {held}. "
        "Run one worker for each GPU, or end one of these"
    )
