"""The health check of the images: what it says of a process that is well, unwell or not there."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from sfllm import probe
from sfllm.admin import AdminServer
from sfllm.metrics import Metrics


@dataclass
class Process:
    """A process that has the problems that a test gives it."""

    problem: str | None = None
    unready: str | None = None
    server: AdminServer = field(init=False)

    def __post_init__(self) -> None:
        self.server = AdminServer(
            "127.0.0.1", 0, Metrics("test:"), lambda: self.problem, lambda: self.unready
        )


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    process = Process()
    monkeypatch.setenv("SFLLM_ADMIN_PORT", str(process.server.port))
    monkeypatch.setenv("SFLLM_ADMIN_HOST", "0.0.0.0")
    yield process
    process.server.close()


def test_a_process_that_is_well_passes(process: Process) -> None:
    assert probe.main([]) == 0


def test_a_process_with_a_problem_fails(process: Process, capsys: pytest.CaptureFixture[str]) -> None:
    process.problem = "the loop stands still"
    assert probe.main([]) == 1
    assert "503" in capsys.readouterr().out


def test_readiness_is_another_question_than_health(process: Process) -> None:
    process.unready = "no model yet"
    assert (probe.main([]), probe.main(["/ready"])) == (0, 1)


def test_a_port_that_nobody_listens_at_fails_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    monkeypatch.setenv("SFLLM_ADMIN_PORT", str(port))
    monkeypatch.setenv("SFLLM_ADMIN_HOST", "127.0.0.1")
    assert probe.main([]) == 1
    assert f"127.0.0.1 port {port} does not answer" in capsys.readouterr().out


def test_an_answer_that_is_no_http_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("SFLLM_ADMIN_PORT", str(listener.getsockname()[1]))
        asking = subprocess.Popen([sys.executable, "-m", "sfllm.probe"], stdout=subprocess.DEVNULL)
        connection, _ = listener.accept()
        connection.close()
        assert asking.wait(30) == 1


def test_a_proxy_is_never_asked(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert subprocess.run([sys.executable, "-m", "sfllm.probe"], timeout=30, check=False).returncode == 0
