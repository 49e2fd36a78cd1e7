"""Single services as separate processes on loopback, whose flags and protocol a test chooses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from chaos.ports import free_ports

PATIENCE_SECONDS = 60.0
CHANGED = """
import runpy, sys
{}
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""
NEWER = "import sfllm.wire; sfllm.wire.PROTOCOL_VERSION += 1"
"""A service as the next protocol version would have it: its frames are of another version than ours."""


class Services:
    """A scheduler's addresses, and processes that were given them, some of them changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        first = free_ports(11)[0]
        self.links = {name: first + index for index, name in enumerate(("gateway", "worker", "asset"))}
        self.api, self.newer_api = first + 3, first + 4
        self._ports = iter(range(first + 5, first + 11))
        self.admin: dict[str, str] = {}

    def start(self, name: str, service: str, *flags: str, changed: str = "") -> None:
        """Start one; `name` is what the test calls it. A scheduler keeps the admin port that it had.

        `changed` are statements that the process runs first, such as `NEWER`. The flags come last, and win.
        """
        if name not in self.admin:
            self.admin[name] = f"127.0.0.1:{next(self._ports)}"
        port = self.admin[name].rpartition(":")[2]
        links = [f"--{link}-address=tcp://127.0.0.1:{number}" for link, number in self.links.items()]
        unknown = {"gateway": "worker", "worker": "gateway"}.get(service, "none")
        command = [
            sys.executable,
            *(("-c", CHANGED.format(changed), f"sfllm_{service}") if changed else ("-m", f"sfllm_{service}")),
        ]
        command += [flag for flag in links if not flag.startswith(f"--{unknown}-")]
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen([*command, f"--admin-port={port}", *flags], stderr=log)

    def stop(self, name: str) -> None:
        process = self._processes.pop(name)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0

    def ready(self, name: str) -> tuple[int, str]:
        """What `/ready` answers at its admin port, and the reason."""
        try:
            with urllib.request.urlopen(f"http://{self.admin[name]}/ready", timeout=5) as answer:
                return int(answer.status), ""
        except urllib.error.HTTPError as error:
            return error.code, str(json.load(error).get("reason"))
        except OSError:
            return 0, ""

    def wait(self, name: str, met: Callable[[tuple[int, str]], bool]) -> None:
        """Until `/ready` of that process is so. Raises AssertionError with its log."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not met(seen := self.ready(name)):
            assert time.monotonic() < deadline, (
                f"{name}: {seen}\n{(self._folder / f'{name}.log').read_text()}"
            )
            time.sleep(0.05)

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(PATIENCE_SECONDS)
