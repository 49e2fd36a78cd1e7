"""The scheduler process that is measured, and what it has used of the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import psutil

STOP_SECONDS = 15.0

SILENT = ("--beat-seconds=600", "--lease-seconds=3600")
"""Peers that send no beats stay known for so long."""


class Scheduler(NamedTuple):
    """A running scheduler and where it listens."""

    process: psutil.Process
    gateway_address: str
    worker_address: str

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far: of the loop and of the thread that moves bytes."""
        used = self.process.cpu_times()
        return float(used.user + used.system)


@contextmanager
def running_scheduler(flags: Sequence[str], core: int | None) -> Iterator[Scheduler]:
    """A scheduler process on one core, if `core` says which."""
    gateway, worker, asset = (f"tcp://127.0.0.1:{_free_port()}" for _ in range(3))
    addresses = [f"--gateway-address={gateway}", f"--worker-address={worker}", f"--asset-address={asset}"]
    command = [sys.executable, "-m", "sfllm_scheduler", *addresses, "--log-level=error", *SILENT, *flags]
    own = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})  # what is started now inherits it, with all its threads
    try:
        process = subprocess.Popen(command)
    finally:
        os.sched_setaffinity(0, own)
    try:
        yield Scheduler(psutil.Process(process.pid), gateway, worker)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)


def cores() -> tuple[int | None, set[int]]:
    """A core for the scheduler, and those for its peers; no core of its own on a machine that has one."""
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        return None, set(available)
    return available[0], set(available[1:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
