"""The way out of a gateway, from the signal to the exit, as its clients see it."""

from __future__ import annotations

import http.client
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess, free_port
from http_client import begin, complete, open_stream, read_all, rest, text_of, wait_until

from sfllm.messages import Cancel, GatewayBye, Submit
from sfllm_gateway.http_server import listen, refuse_new

COMPLETIONS = "/v1/completions"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def admin_status(port: int, path: str) -> int:
    """What the admin port answers; 0 while nobody listens there."""
    try:
        return requests.get(f"http://127.0.0.1:{port}{path}", timeout=5).status_code
    except requests.ConnectionError:
        return 0


class KeptOpen:
    """A connection that is used for one request after another, as long as the server lets it."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)
        self._connection.connect()

    def get(self, path: str) -> http.client.HTTPResponse:
        self._connection.request("GET", path)
        answer = self._connection.getresponse()
        answer.read()
        return answer


@pytest.mark.parametrize("kept_open", [True, False])
def test_no_request_is_lost_when_one_of_two_gateways_leaves(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess], kept_open: bool
) -> None:
    first = start(own_scheduler, "--shutdown-delay-seconds=3")
    first.wait_ready()
    admin = free_port()
    second = start(own_scheduler, f"--port={first.port}", f"--admin-port={admin}")
    wait_until(lambda: admin_status(admin, "/ready") == 200, "the second is not ready", 30)
    leaving, left = threading.Event(), threading.Event()

    def ask() -> int:
        asked = 0
        with requests.Session() as session:
            while asked < 25 or not left.is_set():
                client = session if kept_open else requests
                body = {"prompt": f"say:{asked}"}
                answer = client.post(first.url + COMPLETIONS, json=body, timeout=20)
                assert answer.status_code == 200
                assert answer.json()["choices"][0]["text"] == str(asked)
                asked += 1
                if asked == 5:
                    leaving.set()
        return asked

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask) for _ in range(8)]
        try:
            assert leaving.wait(20)
            first.process.send_signal(signal.SIGTERM)
            assert first.process.wait(20) == 0
        finally:
            left.set()
        assert sum(future.result() for future in asked) >= 200
    assert second.process.poll() is None


@pytest.mark.skipif(sys.platform != "linux", reason="packet filters on sockets are of Linux")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_that_come_while_a_listener_closes_go_to_its_neighbour(host: str) -> None:
    first, second = listen(host, 0), None
    try:
        second = listen(host, first.getsockname()[1])
        refuse_new(first)
        clients = [socket.socket(first.family) for _ in range(32)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(first.getsockname())
        first.settimeout(0)
        with pytest.raises(BlockingIOError):
            first.accept()
        first.close()
        second.settimeout(20)
        for _ in clients:
            second.accept()[0].close()
        for client in clients:
            client.settimeout(20)
            assert client.recv(1) == b""
            client.close()
    finally:
        first.close()
        if second is not None:
            second.close()


def test_connections_that_were_open_are_served_and_told_to_close(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    gateway = start(own_scheduler, "--shutdown-delay-seconds=5")
    gateway.wait_ready()
    clients = [KeptOpen(gateway) for _ in range(3)]
    assert clients[0].get("/ready").status == 200
    gateway.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "draining" in gateway.log(), "the signal did nothing")
    answer = clients[0].get("/ready")
    assert (answer.status, answer.headers["Connection"]) == (503, "close")
    for client in clients[1:]:
        answer = client.get("/v1/models")
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
    assert gateway.process.wait(20) == 0


def test_connections_in_the_backlog_are_served(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    gateway = start(own_scheduler, "--shutdown-delay-seconds=2")
    gateway.wait_ready()
    gateway.process.send_signal(signal.SIGSTOP)  # so that what comes now waits in the kernel
    clients = [begin(gateway, COMPLETIONS, {"prompt": f"say:{number}"}) for number in range(20)]
    gateway.process.send_signal(signal.SIGTERM)
    gateway.process.send_signal(signal.SIGCONT)
    for number, client in enumerate(clients):
        with client:
            answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b'"text":"%d"' % number in answer
    assert gateway.process.wait(20) == 0


def test_an_idle_gateway_leaves_after_the_delay_and_idle_connections_end(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    gateway = start(own_scheduler, "--drain-seconds=60")
    gateway.wait_ready()
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as idle:
        gateway.process.send_signal(signal.SIGTERM)
        assert read_all(idle) == b""
    assert gateway.process.wait(20) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess], second: signal.Signals
) -> None:
    gateway = start(own_scheduler, "--drain-seconds=600", "--shutdown-delay-seconds=600")
    gateway.wait_ready()
    own_scheduler.script.pause_at = 2
    open_stream(gateway)
    gateway.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "draining" in gateway.log(), "the signal did nothing")
    gateway.process.send_signal(second)
    assert gateway.process.wait(20) == 0
    assert "Traceback" not in gateway.log()


def test_the_admin_port_tells_that_it_leaves(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    port = free_port()
    gateway = start(own_scheduler, f"--admin-port={port}", "--shutdown-delay-seconds=600")
    gateway.wait_ready()
    assert admin_status(port, "/ready") == 200
    gateway.process.send_signal(signal.SIGTERM)
    wait_until(lambda: admin_status(port, "/ready") == 503, "still ready")
    assert admin_status(port, "/health") == 200


def test_sigterm_lets_open_streams_finish_and_exits_with_0(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    gateway = start(own_scheduler)
    gateway.wait_ready()
    own_scheduler.script.pause_at = 3
    _, lines = open_stream(gateway)
    own_scheduler.wait_for(Submit)
    gateway.process.send_signal(signal.SIGTERM)

    def refuses() -> bool:
        try:
            return requests.get(f"{gateway.url}/ready", timeout=5).status_code == 503
        except requests.ConnectionError:
            return True

    wait_until(refuses, "it still takes requests")
    threading.Timer(0.2, own_scheduler.resume).start()
    assert text_of(rest(lines)) == ALPHABET
    assert gateway.process.wait(10) == 0
    own_scheduler.wait_for(GatewayBye)


def test_the_end_of_the_drain_time_ends_what_is_open_with_an_error(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    gateway = start(own_scheduler, "--drain-seconds=0.3", "--shutdown-delay-seconds=0.1")
    gateway.wait_ready()
    own_scheduler.script.pause_at = 3
    _, lines = open_stream(gateway)
    own_scheduler.wait_for(Submit)
    gateway.process.send_signal(signal.SIGTERM)
    last = rest(lines)[-1]
    assert last["error"]["code"] == "service_unavailable"  # type: ignore[index]  # JSON of an error
    assert gateway.process.wait(10) == 0
    own_scheduler.wait_for(Cancel)


def test_two_gateways_share_a_port(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    first = start(own_scheduler)
    first.wait_ready()
    second = start(own_scheduler, f"--port={first.port}")
    wait_until(lambda: len(own_scheduler.gateways) == 2, "the second said no hello")
    second.port, second.url = first.port, first.url
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(10) == 0
    second.wait_ready()
    assert complete(second, prompt="say:x")["choices"][0]["text"] == "x"
