"""Processes that all see every GPU take one each: with the driver's own list, CUDA and real locks."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

from bench.gpu_check.checks import Check, Setting

SECONDS = 120

CLAIM = """
import os, sys
from sfllm import logs
from sfllm.settings import WorkerSettings
from sfllm_worker.gpu_claims import NoFreeGpuError, claim_gpu
logs.setup("worker", "error")
settings = WorkerSettings(device="cuda", gpu_claims=sys.argv[1], gpu_claim_seconds=0)
try:
    claimed = claim_gpu(settings, os.environ)
except NoFreeGpuError:
    print("none", flush=True)
else:
    import torch
    print(claimed, torch.cuda.device_count(), f"GPU-{torch.cuda.get_device_properties(0).uuid}", flush=True)
sys.stdin.read()
"""
"""Says what it claimed, how many devices CUDA shows and the first of them; keeps it until its input ends."""

Start = Callable[[], "subprocess.Popen[str]"]


def checks(setting: Setting) -> list[Check]:  # noqa: ARG001 - every area is asked in this way
    """What tests can only do with a list of GPUs that is made up."""
    title = "a claimed GPU is the one that CUDA shows, and no other process gets it"
    return [Check(title, claims, needs_gpu=True, seconds=400.0)]


def claims() -> str:
    """Processes claim GPUs until there is none left; one that is killed is followed by another."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sfllm-claims-"))

        def start() -> subprocess.Popen[str]:
            command = [sys.executable, "-c", CLAIM, folder]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen(command, text=True, **pipes))
            stack.callback(process.kill)
            return process

        taken = claim_all(start)
        claimed, victim = taken.popitem()
        victim.kill()
        victim.wait(SECONDS)
        told = first_line(start())
        assert told.startswith(claimed), f"{claimed} was not free after its process was killed: {told}"
    return f"{len(taken) + 1} claimed, one more process refused, one taken over"


def claim_all(start: Start) -> dict[str, subprocess.Popen[str]]:
    """Every GPU and the process that claimed it."""
    taken: dict[str, subprocess.Popen[str]] = {}
    while (told := first_line(process := start())) != "none":
        claimed, count, seen = told.split()
        assert claimed not in taken, f"{claimed} was claimed twice"
        assert count == "1", f"CUDA shows {count} devices to a process that claimed one"
        assert claimed.startswith("MIG-") or claimed == seen, f"{claimed} was claimed, CUDA shows {seen}"
        taken[claimed] = process
    assert taken, "no GPU could be claimed"
    return taken


def first_line(process: subprocess.Popen[str]) -> str:
    """What a process says; empty if it ends without a word."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, "a process that was to claim a GPU ended without a word"
    return line
