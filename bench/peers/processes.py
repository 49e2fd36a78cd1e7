"""Starts and stops the servers of the comparison."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
from bench.peers.contenders import Contender

START_SECONDS = 600.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.05
ATTEMPT_SECONDS = 60.0


class StartError(Exception):
    """A server did not come up; the text says where its output is."""


class Running(NamedTuple):
    """A server that answered.

    `start_seconds` run from its start to the end of a first answer of one token, `ready_seconds` to when
    it said that it was ready.
    """

    contender: Contender
    url: str
    pid: int
    start_seconds: float
    ready_seconds: float

    def is_alive(self) -> bool:
        """Whether it still answers, within a minute."""
        return _answers(self.url, self.contender.model)

    def memory_bytes(self) -> int:
        """Proportional memory of all its processes, pages that they share counted once."""
        root = psutil.Process(self.pid)
        total = 0
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                total += process.memory_full_info().pss
        return total


@contextlib.contextmanager
def running(contender: Contender, logs: Path) -> Iterator[Running]:
    """The server, ready for requests; stopped with all that it started. Raises `StartError`."""
    port = _free_port()
    command = [part.replace("{port}", str(port)) for part in contender.command]
    log = logs / f"{contender.name}.log"
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **contender.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"

            def wait_for(answer: Callable[[], bool]) -> float:
                while not answer():
                    if process.poll() is not None or time.monotonic() - started > START_SECONDS:
                        raise StartError(f"{contender.name} did not start; its output is in {log}")
                    time.sleep(POLL_SECONDS)
                return time.monotonic() - started

            ready = wait_for(lambda: _is_ready(url + contender.ready_path))
            first_token = wait_for(lambda: _answers(url, contender.model))
            yield Running(contender, url, process.pid, first_token, ready)
        finally:
            _stop(process)


def end_on_terminate() -> None:
    """Make SIGTERM leave this program as an exception does, so that servers are stopped."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=ATTEMPT_SECONDS):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _answers(url: str, model: str) -> bool:
    """Whether it answers a request for one token."""
    body = json.dumps({"model": model, "prompt": "The", "max_tokens": 1, "stream": True}).encode()
    request = urllib.request.Request(
        f"{url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=ATTEMPT_SECONDS) as response:
            return b"data:" in response.read()
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it and its whole session: some servers leave processes behind."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_SECONDS)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
