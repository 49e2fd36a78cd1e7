"""Processes of two protocol versions: neither harms the other, and each says why they cannot meet."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos.ports import free_ports

from sfllm.wire import PROTOCOL_VERSION
from sfllm_cli.main import main

PATIENCE_SECONDS = 60.0
STREAM_TOKENS = 400
NEWER = """
import runpy, sys
import sfllm.wire
sfllm.wire.PROTOCOL_VERSION += 1
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""
"""A service as the next protocol version would have it: its frames are of another version than ours."""

OLD_MEETS_NEW = f"peer speaks protocol version {PROTOCOL_VERSION + 1}, this process {PROTOCOL_VERSION}"
NEW_MEETS_OLD = f"peer speaks protocol version {PROTOCOL_VERSION}, this process {PROTOCOL_VERSION + 1}"


class Services:
    """A scheduler's addresses, and processes of either version that were given them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        first = free_ports(11)[0]
        self._links = {name: first + index for index, name in enumerate(("gateway", "worker", "asset"))}
        self.api, self.newer_api = first + 3, first + 4
        self._ports = iter(range(first + 5, first + 11))
        self.admin: dict[str, str] = {}

    def start(self, name: str, service: str, *flags: str, newer: bool) -> None:
        """Start one; `name` is what the test calls it. A scheduler keeps the admin port that it had."""
        if name not in self.admin:
            self.admin[name] = f"127.0.0.1:{next(self._ports)}"
        port = self.admin[name].rpartition(":")[2]
        links = [f"--{link}-address=tcp://127.0.0.1:{number}" for link, number in self._links.items()]
        unknown = {"gateway": "worker", "worker": "gateway"}.get(service, "none")
        command = [
            sys.executable,
            *(("-c", NEWER, f"sfllm_{service}") if newer else ("-m", f"sfllm_{service}")),
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


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    made = Services(tmp_path)
    yield made
    made.close()


def test_newer_processes_harm_no_stream_of_older_ones_and_say_what_they_wait_for(
    services: Services, tmp_path: Path
) -> None:
    api, newer_api = services.api, services.newer_api
    worker = ("--mock", "--mock-tokens-per-second=200", "--served-model-name=mock")
    services.start("scheduler", "scheduler", newer=False)
    services.start("worker", "worker", *worker, newer=False)
    services.start("gateway", "gateway", f"--port={api}", newer=False)
    services.wait("gateway", lambda seen: seen[0] == 200)

    body = {"model": "mock", "prompt": "x", "stream": True, "max_tokens": STREAM_TOKENS, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{api}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as stream:
        stream.readline()
        services.start("newer worker", "worker", *worker, newer=True)
        services.start("newer gateway", "gateway", f"--port={newer_api}", newer=True)
        for name in ("newer worker", "newer gateway"):
            services.wait(name, lambda seen: seen == (503, f"{NEW_MEETS_OLD}: upgrade one"))
            assert services.log(name).count("cannot be talked to") == 1
        text = stream.read().decode()
    assert text.count('"finish_reason":"length"') == 1
    assert text.endswith("data: [DONE]\n\n")
    assert OLD_MEETS_NEW in services.log("scheduler")
    assert services.ready("gateway") == services.ready("worker") == (200, "")

    findings = tmp_path / "findings.json"
    flags = [f"--url=http://127.0.0.1:{api}", "--sample-seconds=0", f"--json={findings}"]
    assert main(["doctor", *flags, "--admin", *services.admin.values()]) == 1
    (found,) = [each for each in json.loads(findings.read_text())["findings"] if each["check"] == "protocol"]
    assert found["status"] == "problem"
    older, newer = found["meaning"].partition(f"; {PROTOCOL_VERSION + 1}: ")[::2]
    for name, address in services.admin.items():
        assert address in (newer if name.startswith("newer") else older)

    # The scheduler is what the others follow: no newer process has to be started again.
    services.stop("scheduler")
    services.start("scheduler", "scheduler", newer=True)
    services.wait("newer gateway", lambda seen: seen[0] == 200)
    services.wait("newer worker", lambda seen: seen[0] == 200)
    for name in ("worker", "gateway"):
        services.wait(name, lambda seen: seen == (503, f"{OLD_MEETS_NEW}: upgrade one"))
