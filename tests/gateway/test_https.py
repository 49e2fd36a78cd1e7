"""HTTPS with a real certificate, and a way out that loses no connection there either."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess
from openai import DefaultHttpxClient, OpenAI


class Certificate(NamedTuple):
    cert: Path
    key: Path

    def flags(self) -> tuple[str, str]:
        return f"--tls-cert-file={self.cert}", f"--tls-key-file={self.key}"


def make_certificate(directory: Path, *options: str) -> Certificate:
    """A certificate for localhost that signs itself."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("no openssl here to make a certificate with")
    made = Certificate(directory / "cert.pem", directory / "key.pem")
    subprocess.run(
        [
            *(program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(made.key), "-out", str(made.cert), *(options or ("-nodes",))),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return made


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def context_of(certificate: Certificate) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate.cert))


def connect(gateway: GatewayProcess, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", gateway.port), timeout=20)
    return context.wrap_socket(plain, server_hostname="localhost")


def wait_for_tls(gateway: GatewayProcess, certificate: Certificate) -> None:
    end = time.monotonic() + 30
    url = f"https://localhost:{gateway.port}/ready"
    while True:
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(url, verify=str(certificate.cert), timeout=5).status_code == 200:
                return
        assert gateway.process.poll() is None, gateway.log()
        assert time.monotonic() < end, gateway.log()
        time.sleep(0.02)


@pytest.fixture
def https(
    start: Callable[..., GatewayProcess], own_scheduler: FakeScheduler, certificate: Certificate
) -> GatewayProcess:
    """A gateway that serves HTTPS."""
    gateway = start(own_scheduler, *certificate.flags(), "--shutdown-delay-seconds=2")
    wait_for_tls(gateway, certificate)
    return gateway


def test_a_client_that_checks_the_certificate_is_answered_and_streamed_to(
    https: GatewayProcess, certificate: Certificate
) -> None:
    with DefaultHttpxClient(verify=context_of(certificate)) as web:
        url = f"https://localhost:{https.port}/v1"
        client = OpenAI(base_url=url, api_key="none", http_client=web, max_retries=0, timeout=20)
        answer = client.completions.create(model="tiny", prompt="say:hello")
        assert answer.choices[0].text == "hello"
        stream = client.completions.create(model="tiny", prompt="say:hello again", stream=True)
        assert "".join(event.choices[0].text for event in stream) == "hello again"


def test_old_protocols_and_weak_ciphers_are_not_spoken(
    https: GatewayProcess, certificate: Certificate
) -> None:
    context = context_of(certificate)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with connect(https, context) as client:
        name = (client.cipher() or ("", "", 0))[0]
        assert "GCM" in name or "CHACHA20" in name
    weak = context_of(certificate)
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    weak.set_ciphers("ECDHE-ECDSA-AES128-SHA:ECDHE-ECDSA-AES256-SHA")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        connect(https, weak)


def test_http_on_the_port_of_https_gets_no_answer_and_harms_nobody(
    https: GatewayProcess, certificate: Certificate
) -> None:
    with socket.create_connection(("127.0.0.1", https.port), timeout=20) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"200 OK" not in plain.recv(4096)
    wait_for_tls(https, certificate)


def test_a_gateway_that_leaves_ends_what_it_streams(https: GatewayProcess, certificate: Certificate) -> None:
    with requests.post(
        f"https://localhost:{https.port}/v1/completions",
        json={"prompt": "x", "stream": True, "max_tokens": 26},
        verify=str(certificate.cert),
        stream=True,
        timeout=20,
    ) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines(chunk_size=1)
        assert next(lines).startswith(b"data: ")
        https.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == b"data: [DONE]"
    code, log = https.stop()
    assert code == 0, log
    assert "Traceback" not in log


def test_who_connects_while_a_gateway_leaves_is_served_and_who_says_nothing_does_not_hold_it(
    https: GatewayProcess, certificate: Certificate
) -> None:
    https.process.send_signal(signal.SIGSTOP)  # the kernel alone takes connections in
    plain = socket.create_connection(("127.0.0.1", https.port), timeout=20)
    silent = socket.create_connection(("127.0.0.1", https.port), timeout=20)
    https.process.send_signal(signal.SIGTERM)
    https.process.send_signal(signal.SIGCONT)
    with silent, context_of(certificate).wrap_socket(plain, server_hostname="localhost") as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200 OK")
        code, log = https.stop()
    assert code == 0, log
    assert "Traceback" not in log


@pytest.mark.parametrize("case", ["no such file", "no certificate", "an encrypted key", "another key"])
def test_a_certificate_that_cannot_be_used_is_told_at_the_start(
    start: Callable[..., GatewayProcess],
    scheduler: FakeScheduler,
    certificate: Certificate,
    tmp_path: Path,
    case: str,
) -> None:
    if case == "no such file":
        given = Certificate(tmp_path / "none", certificate.key)
    elif case == "no certificate":
        (tmp_path / "text").write_text("hello")
        given = Certificate(tmp_path / "text", certificate.key)
    elif case == "an encrypted key":
        given = make_certificate(tmp_path, "-passout", "pass:secret")
    else:
        given = make_certificate(tmp_path)._replace(cert=certificate.cert)
    gateway = start(scheduler, *given.flags())
    assert gateway.process.wait(20) == 2
    assert "--tls-cert-file and --tls-key-file: " in gateway.log()
    assert "Traceback" not in gateway.log()


def test_a_certificate_without_its_key_is_refused(
    start: Callable[..., GatewayProcess], scheduler: FakeScheduler
) -> None:
    gateway = start(scheduler, "--tls-cert-file=x.pem")
    assert gateway.process.wait(20) == 2
    assert "--tls-cert-file and --tls-key-file need each other" in gateway.log()
