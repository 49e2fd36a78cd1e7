"""A process's own /health and /metrics, over real HTTP."""

from __future__ import annotations

import json
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from sfllm.admin import AdminServer
from sfllm.metrics import Metrics
from sfllm.version import VERSIONS


class Process:
    """A process that has a problem when a test says so."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self.metrics = Metrics("test:")
        self.unready: str | None = None
        self.server = AdminServer("127.0.0.1", 0, self.metrics, lambda: self.problem, lambda: self.unready)

    def get(self, path: str) -> tuple[int, str, str]:
        url = f"http://127.0.0.1:{self.server.port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], error.read().decode()


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process()
    yield process
    process.server.close()


def test_a_process_without_a_problem_is_healthy(process: Process) -> None:
    status, content_type, body = process.get("/health?verbose=1")
    assert (status, content_type) == (200, "application/json")
    assert json.loads(body)["status"] == "healthy"
    assert isinstance(json.loads(body)["timestamp"], int)


def test_a_process_tells_its_version(process: Process) -> None:
    status, content_type, body = process.get("/version")
    assert (status, content_type, json.loads(body)) == (200, "application/json", VERSIONS)


def test_a_problem_makes_it_unhealthy_and_is_named(process: Process) -> None:
    process.problem = "the loop stands still"
    status, _, body = process.get("/health")
    assert status == 503
    assert json.loads(body)["reason"] == "the loop stands still"


def test_a_process_that_cannot_serve_now_is_unready_but_healthy(process: Process) -> None:
    assert process.get("/ready")[0] == 200
    process.unready = "no scheduler yet"
    status, _, body = process.get("/ready")
    assert (status, json.loads(body)["reason"]) == (503, "no scheduler yet")
    assert process.get("/health")[0] == 200
    process.unready, process.problem = None, "broken"
    assert process.get("/ready")[0] == 503


def test_metrics_are_shown_with_their_prefix_labels_and_buckets(process: Process) -> None:
    process.metrics.counter("things_total", "Things.", ["kind"]).labels("a").inc(2)
    process.metrics.gauge("level", "Level.").set(1.5)
    process.metrics.histogram("seconds", "Time.", (0.1, 1.0)).observe(0.5)
    status, content_type, body = process.get("/metrics")
    assert status == 200
    assert content_type.startswith("text/plain; version=0.0.4")
    lines = body.splitlines()
    assert 'test:things_total{kind="a"} 2.0' in lines
    assert "test:level 1.5" in lines
    assert 'test:seconds_bucket{le="0.1"} 0.0' in lines
    assert 'test:seconds_bucket{le="1.0"} 1.0' in lines
    assert any(line.startswith("process_resident_memory_bytes") for line in lines)


def test_other_paths_are_not_found(process: Process) -> None:
    status, _, body = process.get("/")
    assert status == 404
    assert "/metrics" in json.loads(body)["error"]["message"]


def test_a_taken_port_is_an_error(process: Process) -> None:
    with pytest.raises(OSError, match="in use"):
        AdminServer("127.0.0.1", process.server.port, process.metrics, lambda: None)


def test_after_closing_the_port_is_free() -> None:
    process = Process()
    port = process.server.port
    process.server.close()
    again = AdminServer("127.0.0.1", port, process.metrics, lambda: None)
    again.close()


def test_one_who_hangs_up_before_the_answer_leaves_no_trace_in_the_log(
    process: Process, capfd: pytest.CaptureFixture[str]
) -> None:
    asked, gone = threading.Event(), threading.Event()

    class Slow:
        def render(self) -> bytes:
            asked.set()
            gone.wait(30)
            return b"x" * 2**20

    process.server._metrics = Slow()  # type: ignore[assignment]  # metrics that take long to put together
    before = set(threading.enumerate())
    with socket.create_connection(("127.0.0.1", process.server.port)) as impatient:
        impatient.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        impatient.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert asked.wait(30)
        (answering,) = set(threading.enumerate()) - before
    gone.set()
    answering.join(30)
    assert not answering.is_alive()
    assert capfd.readouterr().err == ""
