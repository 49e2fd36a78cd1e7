"""`sfllm doctor` against real stacks, whole and broken: what it finds, and what it says to do."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from chaos.ports import free_ports
from running_stack import RunningStack

from sfllm_cli.doctor.certificate import read_certificate
from sfllm_cli.doctor.findings import Finding
from sfllm_cli.main import main

KEY = "sk-of-this-test"
MODEL_GONE_SECONDS = 60
CERTIFICATE = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
    "-addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
)


@pytest.fixture(scope="module")
def closed() -> Iterator[RunningStack]:
    """A stack that asks for a key, which others than this machine may present as well."""
    running = RunningStack("--mock", f"--api-key={KEY}", "--host=0.0.0.0")
    running.wait_until_ready()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def opened() -> Iterator[RunningStack]:
    """A stack without keys, with two workers that are missed soon."""
    running = RunningStack("--mock", "--lease-seconds=1", "--beat-seconds=0.2", workers=2)
    running.wait_until_ready()
    running.wait_for_metric(running.scheduler_admin, "sfllm:workers", 2, state="serving")
    yield running
    assert running.stop() == 0


def admin(stack: RunningStack) -> list[str]:
    """The ports of all its processes: scheduler, gateway, workers."""
    first = int(stack.scheduler_admin.rpartition(":")[2])
    return [f"127.0.0.1:{first + index}" for index in range(2 + len(stack.worker_pids()))]


def doctor(tmp_path: Path, *flags: str) -> tuple[int, dict[str, Finding]]:
    """Its exit code and its findings by the name of their check."""
    file = tmp_path / "findings.json"
    code = main(["doctor", "--sample-seconds=0", f"--json={file}", *flags])
    document = json.loads(file.read_text())
    assert document["ok"] == (code == 0)
    return code, {found["check"]: Finding(**found) for found in document["findings"]}


def problems(findings: dict[str, Finding]) -> set[str]:
    return {name for name, found in findings.items() if found.status == "problem"}


def test_a_whole_stack_has_no_problem(
    closed: RunningStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFLLM_API_KEY", KEY)
    scheduler, gateway, worker = admin(closed)
    code, findings = doctor(tmp_path, f"--url={closed.url}/v1/", "--admin", scheduler, gateway, worker)
    assert (code, problems(findings)) == (0, set())
    expected = {
        "ready": "a request can be served now",
        "API keys": "requests without a key are refused",
        "your key": "it works",
        f"links of gateway at {gateway}": "1 scheduler connected",
        f"workers of scheduler at {scheduler}": "1 serving",
        "workers of mock": "1 can serve it",
        "card of mock": "tokenizer and chat template are loaded",
        "streams": "0 of 2048 are open",
        f"worker at {worker}": "lives and is ready",
        "encryption of links": "they are not encrypted, and all that was asked is on this machine",
        f"peers of scheduler at {scheduler}": "nobody is refused",
        f"KV cache of worker at {worker}": "0% used",
        f"queue of scheduler at {scheduler}": "0 requests wait, and it does not grow",
    }
    assert {name: findings[name].meaning for name in expected} == expected
    assert findings["versions"].meaning.startswith("all run ")
    assert {findings[name].status for name in ("versions", "clocks", "open files")} == {"ok"}
    printed = capsys.readouterr().out
    assert "what to do" in printed
    assert "0 problems" in printed


def test_without_admin_ports_it_says_what_it_does_not_see(opened: RunningStack, tmp_path: Path) -> None:
    code, findings = doctor(tmp_path, f"--url={opened.url}")
    assert code == 0
    assert "--admin" in findings["admin ports"].remedy
    assert findings["workers of mock"].meaning == "2 can serve it"
    assert findings["API keys"].meaning == "no key is needed, and only this machine can reach the API"


def test_a_key_that_is_not_given_or_wrong_is_told_but_never_shown(
    closed: RunningStack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, findings = doctor(tmp_path, f"--url={closed.url}")
    assert (code, findings["models"].status) == (0, "warning")
    assert "SFLLM_API_KEY" in findings["models"].remedy
    code, findings = doctor(tmp_path, f"--url={closed.url}", "--api-key=sk-that-is-wrong")
    assert (code, problems(findings)) == (1, {"your key"})
    assert "not known here" in findings["your key"].meaning
    shown = capsys.readouterr()
    assert "sk-that-is-wrong" not in shown.out + shown.err + (tmp_path / "findings.json").read_text()


def test_an_api_that_is_open_beyond_this_machine_is_a_problem(tmp_path: Path) -> None:
    running = RunningStack("--mock", "--host=0.0.0.0", "--allow-anonymous")
    try:
        running.wait_until_ready()
        code, findings = doctor(tmp_path, f"--url={running.url}")
    finally:
        running.stop()
    assert (code, problems(findings)) == (1, {"API keys"})
    assert "beyond loopback" in findings["API keys"].meaning
    assert "sfllm keys add" in findings["API keys"].remedy


def test_where_nothing_listens_it_says_so_and_how_to_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api, process = free_ports(2)
    code, findings = doctor(tmp_path, f"--url=http://127.0.0.1:{api}", f"--admin=127.0.0.1:{process}")
    assert (code, problems(findings)) == (1, {"gateway", f"process at 127.0.0.1:{process}"})
    assert findings["gateway"].meaning == f"nothing listens at 127.0.0.1:{api}"
    assert "sfllm serve" in findings["gateway"].remedy
    assert "2 problems" in capsys.readouterr().out


def test_a_port_that_another_program_has_names_that_program(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{server.server_address[1]}"
        code, findings = doctor(tmp_path, f"--url=http://{where}", f"--admin={where}")
        server.shutdown()
    assert (code, problems(findings)) == (1, {"gateway", f"process at {where}"})
    for name in problems(findings):
        assert "is taken by something" in findings[name].meaning
        assert f"process {os.getpid()}" in findings[name].meaning


@pytest.mark.parametrize(
    "flags",
    [["--url=http://127.0.0.1:70000"], ["--admin=127.0.0.1:70000"], ["--admin=9100"], ["--url=ftp://a"]],
)
def test_an_address_that_cannot_be_is_wrong_usage(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *flags])
    assert ended.value.code == 2
    assert flags[0][:5] in capsys.readouterr().err


def test_an_address_of_ipv6_is_one_address(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as held:
        held.bind(("::1", 0))  # bound, so that nothing else can listen there, and not listening
        code, findings = doctor(tmp_path, f"--url=http://[::1]:{held.getsockname()[1]}")
    assert code == 1
    assert findings["gateway"].meaning.startswith("nothing listens at [::1]:")


def test_the_findings_can_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    assert main(["doctor", f"--url=http://127.0.0.1:{port}", "--sample-seconds=0", "--json=-"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["ok"] is False
    assert "nothing listens" in shown.err


def test_a_worker_that_stands_still_and_then_workers_that_are_killed_are_found(
    opened: RunningStack, tmp_path: Path
) -> None:
    ports = admin(opened)
    flags = (f"--url={opened.url}", "--admin", *ports)
    workers = [psutil.Process(pid) for pid in opened.worker_pids()]
    # Stopped, so that it does not start others in their place.
    opened.process.send_signal(signal.SIGSTOP)
    try:
        workers[0].suspend()
        opened.wait_for_metric(opened.scheduler_admin, "sfllm:workers", 1, state="serving")
        code, findings = doctor(tmp_path, *flags, "--timeout-seconds=2")
        assert code == 1
        (hung,) = problems(findings)
        assert findings[hung].meaning == "no answer in time"
        assert findings["workers of mock"].meaning == "1 can serve it"

        for worker in workers:
            worker.kill()
        deadline = time.monotonic() + MODEL_GONE_SECONDS
        while opened.status("/ready") != 503:
            assert time.monotonic() < deadline, opened.log()
            time.sleep(0.05)
        opened.wait_for_metric(opened.scheduler_admin, "sfllm:workers", 0, state="serving")
        code, findings = doctor(tmp_path, *flags)
    finally:
        opened.process.send_signal(signal.SIGCONT)
    assert code == 1
    gone = {f"process at {port}" for port in ports[2:]}
    assert problems(findings) == gone | {
        "ready",
        "workers of mock",
        f"workers of scheduler at {ports[0]}",
        f"gateway at {ports[1]}",
    }
    assert "no worker is there" in findings["ready"].meaning
    assert "log" in findings["ready"].remedy
    assert {findings[name].meaning for name in gone} == {"nothing listens there"}
    assert "503" in findings["workers of mock"].meaning
    opened.wait_until_ready()


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[int]:
    """The port of a server whose certificate has two days left."""
    subprocess.run(CERTIFICATE.split(), cwd=tmp_path, check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


def test_the_end_of_a_certificate_is_read_whether_it_is_trusted_or_not(
    tls_server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_certificate("127.0.0.1", tls_server, 10)
    assert found.days_left == pytest.approx(2, abs=0.1)
    assert "self-signed" in found.refusal
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    assert read_certificate("127.0.0.1", tls_server, 10).refusal == ""


def test_a_server_without_tls_shows_no_certificate() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = read_certificate("127.0.0.1", server.getsockname()[1], 0.2)
    assert found.days_left is None
    assert found.fault
