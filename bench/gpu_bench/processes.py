"""Runs a command for so long at most, and ends whatever it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu_bench.results import ROOT

STOP_SECONDS = 20
END_SECONDS = 10


def run_within(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Run a command: its exit code, or None if it had to be stopped, and its standard error.

    It has a session of its own, and no process of that session is left: a stage has servers of its own.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, cwd=ROOT, stderr=said, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        finally:
            _end_session(process.pid)
            process.wait()
        said.seek(0)
        return code, said.read()


def _end_session(session: int) -> None:
    """Kill a session's processes until there are none: servers run in process groups of their own."""
    deadline = time.monotonic() + END_SECONDS
    while (found := _alive_in(session)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _alive_in(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended while we looked
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found
