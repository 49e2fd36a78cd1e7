"""A whole sfllm, started the way a user starts it and stopped by its own process id."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from chaos.metrics import total
from chaos.ports import free_ports

READY_TIMEOUT_SECONDS = 120
STOP_TIMEOUT_SECONDS = 60


class RunningStack:
    """`sfllm serve` with the given flags. Admin ports: scheduler, then gateways, then workers."""

    def __init__(self, *flags: str, workers: int = 1) -> None:
        port = free_ports(3 + workers)[0]
        self.url = f"http://127.0.0.1:{port}"
        self.scheduler_admin = f"http://127.0.0.1:{port + 1}"
        self.worker_admins = [f"http://127.0.0.1:{port + 3 + index}" for index in range(workers)]
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - lives as long as the stack
        command = [sys.executable, "-m", "sfllm_cli", "serve", f"--port={port}", f"--admin-port={port + 1}"]
        self.process = subprocess.Popen(
            [*command, f"--workers={workers}", *flags],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        while self.status("/ready") != 200:
            assert self.process.poll() is None, f"sfllm serve ended early:\n{self.log()}"
            assert time.monotonic() < deadline, f"not ready in time:\n{self.log()}"
            time.sleep(0.05)

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def metric(self, url: str, name: str, **labels: str) -> float:
        """The sum over the samples of a metric that have these labels."""
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        assert re.search(rf"^{name}[ {{]", text, re.MULTILINE), f"{name} is not in:\n{text}"
        return total(text, name, **labels)

    def wait_for_metric(self, url: str, name: str, value: float, **labels: str) -> None:
        deadline = time.monotonic() + 30
        while (seen := self.metric(url, name, **labels)) != value:
            assert time.monotonic() < deadline, f"{name} stayed at {seen}, expected {value}\n{self.log()}"
            time.sleep(0.05)

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that this stack's supervisor started."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue  # it ended while we looked
                if parent == self.process.pid and b"sfllm_worker" in command:
                    found.append(int(entry.name))
        return found

    def log_lines(self) -> list[str]:
        """Everything that the supervisor and its processes have logged."""
        return Path(self._log.name).read_text().splitlines()

    def log(self) -> str:
        return "\n".join(self.log_lines()[-60:])

    def stop(self) -> int:
        """SIGTERM, as a service manager would; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._log.close()
