"""Starts and stops a real gateway process for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

import psutil
import requests
from fake_scheduler import FakeScheduler


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class GatewayProcess:
    """A real gateway process in front of a fake scheduler."""

    def __init__(
        self, scheduler: FakeScheduler, *flags: str, variables: Mapping[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # To a file: a pipe that nobody reads would stop the process one day.
        self._log = tempfile.TemporaryFile("ab+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "sfllm_gateway", f"--port={self.port}"),
                f"--gateway-address={scheduler.gateway_address}",
                f"--asset-address={scheduler.asset_address}",
                *("--log-format=json", "--connect-wait-seconds=0", *flags),
            ],
            env={key: value for key, value in os.environ.items() if not key.startswith("SFLLM_")}
            | dict(variables or {}),
            stderr=self._log,
        )

    def wait_ready(self, status: int = 200, timeout: float = 20) -> requests.Response:
        """Poll `/ready` until it answers `status`."""
        end = time.monotonic() + timeout
        while True:
            try:
                answer = requests.get(f"{self.url}/ready", timeout=5)
                if answer.status_code == status:
                    return answer
            except requests.ConnectionError:
                assert self.process.poll() is None, self.log()
            assert time.monotonic() < end, "the gateway did not get ready"
            time.sleep(0.02)

    def wait_until(self, met: Callable[[], bool], timeout: float = 20) -> None:
        """Poll until a condition about this process is met."""
        end = time.monotonic() + timeout
        while not met():
            assert time.monotonic() < end, self.log()
            time.sleep(0.02)

    def resident_bytes(self) -> int:
        """Memory that the process holds."""
        return psutil.Process(self.process.pid).memory_info().rss

    def metric(self, name: str) -> float:
        """The sum over labels of a metric."""
        text = requests.get(f"{self.url}/metrics", timeout=5).text
        lines = [line for line in text.splitlines() if line.startswith(f"sfllm:{name}") and line[0] != "#"]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def stop(self) -> tuple[int, str]:
        """Exit code and log after SIGTERM."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20), self.log()

    def log(self) -> str:
        """All that it logged so far."""
        return os.pread(self._log.fileno(), 2**24, 0).decode()
