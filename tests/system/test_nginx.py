"""The real nginx in front of two gateways: streams pass unbuffered, and nobody notices a rolling restart."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from chaos.ask import Reading, ask
from chaos.fleet import Fleet, eventually
from chaos.http_client import Address, Connection, get
from chaos.layout import FleetOptions
from chaos.ports import free_ports
from short_streams import completion

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "deploy" / "nginx"
CLIENTS = 12
TWO_GATEWAYS = FleetOptions(gateways=2, relays=False, worker={"mock_tokens_per_second": 100.0})

pytestmark = pytest.mark.system


@pytest.fixture
def nginx_program() -> str:
    # Debian has it where only root's search path leads.
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        pytest.skip("NO PROXY WAS TESTED: there is no nginx (Debian: apt install nginx-light)")
    return found


class Stack(NamedTuple):
    """A fleet, and nginx in front of its gateways."""

    fleet: Fleet
    proxy: Address


@contextmanager
def nginx(program: str, directory: Path, gateways: Sequence[Address], port: int) -> Iterator[None]:
    """Run nginx with the deployed files; only ports, places for files, and the gateways differ."""
    # Started by root, its workers would be another user, who cannot write to a test's folder.
    user = "user root; " if os.geteuid() == 0 else ""
    log = directory / "nginx.log"
    command = [program, "-c", str(_configure(directory, gateways, port)), "-g", f"{user}daemon off;"]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield
            assert process.poll() is None, log.read_text()[-3000:]
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _configure(directory: Path, gateways: Sequence[Address], port: int) -> Path:
    for path in CONFIGURATION.glob("*.conf"):
        text = path.read_text().replace("/tmp/", f"{directory}/")
        (directory / path.name).write_text(re.sub(r"listen 8080;", f"listen 127.0.0.1:{port};", text))
    # Gateways ask for unbuffered streams by a header as well; here the configuration is to see to it alone.
    locations = directory / "locations.conf"
    locations.write_text(f"{locations.read_text()}\nproxy_ignore_headers X-Accel-Buffering;\n")
    main = directory / "nginx.conf"
    main.write_text(main.read_text().replace("/dev/stdout", str(directory / "access.log")))
    upstream = directory / "upstream.conf"
    line = "server gateway:8081 max_fails=0;"
    servers = "\n".join(line.replace("gateway:8081", f"{each.host}:{each.port}") for each in gateways)
    assert line in upstream.read_text()
    upstream.write_text(upstream.read_text().replace(line, servers))
    return main


@asynccontextmanager
async def running(program: str, directory: Path, options: FleetOptions) -> AsyncIterator[Stack]:
    (port,) = free_ports(1)
    async with Fleet(options, directory / "fleet") as fleet:
        with nginx(program, directory, list(fleet.urls.values()), port):
            proxy = Address("127.0.0.1", port)

            async def is_there() -> bool:
                try:
                    return (await get(proxy, "/nginx-health"))[0] == 200
                except OSError:
                    return False

            assert await eventually(is_there, 30), (directory / "nginx.log").read_text()
            yield Stack(fleet, proxy)


async def test_tokens_come_through_as_they_are_made(nginx_program: str, tmp_path: Path) -> None:
    """The client has the first token before the last, which is made two seconds later, can be there."""
    arrivals: list[float] = []
    slow = TWO_GATEWAYS._replace(worker={"mock_tokens_per_second": 20.0})
    async with running(nginx_program, tmp_path, slow) as stack:
        reading = Reading(on_tokens=lambda _: arrivals.append(time.monotonic()))
        delivery = await ask(stack.proxy, completion("long", max_tokens=40), reading=reading)
    assert (delivery.ended, delivery.tokens) == ("complete", 40)
    assert arrivals[-1] - arrivals[0] > 1
    # Each comes by itself, 50 ms after the one before. A buffer would pass on several kilobytes at once,
    # which makes three or four moments of it.
    moments = 1 + sum(later - earlier > 0.01 for earlier, later in itertools.pairwise(arrivals))
    assert moments > 15


async def test_a_rolling_restart_of_the_gateways_under_load_gives_no_error(
    nginx_program: str, tmp_path: Path
) -> None:
    stopping = asyncio.Event()

    async with running(nginx_program, tmp_path, TWO_GATEWAYS) as stack:

        async def client(number: int) -> int:
            answers = 0
            shape = {} if number % 2 else {"stream": False, "stream_options": None}
            template = completion(f"client {number}", max_tokens=20, seed=number, **shape)
            while not stopping.is_set():
                delivery = await ask(stack.proxy, template)
                assert (delivery.ended, delivery.status) == ("complete", 200), delivery
                answers += 1
            return answers

        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(client(number)) for number in range(CLIENTS)]
            for _ in range(2):
                for gateway in stack.fleet.of_kind("gateway"):
                    lives = gateway.lives
                    assert gateway.terminate()
                    assert await gateway.ended(lives, 60), gateway.name
                    assert gateway.ends[-1].code == 0
                    await stack.fleet.wait_ready()
            stopping.set()
        assert all(task.result() > 0 for task in clients)
        await _check_both_were_used(tmp_path, stack)


async def _check_both_were_used(directory: Path, stack: Stack) -> None:
    lines = (directory / "access.log").read_text().splitlines()
    for gateway in stack.fleet.urls.values():
        assert any(f"gateway {gateway.host}:{gateway.port} 200" in line for line in lines)
    # What a restart did to connections was mended by asking the other gateway.
    assert not [line for line in lines if re.search(r'" 5\d\d \d+ bytes', line)]


@pytest.mark.parametrize(("headers", "status"), [({"Idempotency-Key": "one"}, 200), ({}, 502)])
async def test_a_request_whose_gateway_dies_is_sent_again_if_its_client_allows_it(
    nginx_program: str, tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    slow = TWO_GATEWAYS._replace(worker={"mock_tokens_per_second": 20.0})
    async with running(nginx_program, tmp_path, slow) as stack:
        connection = await Connection.open(stack.proxy)
        try:
            body = {"prompt": "Tell me", "max_tokens": 40, "ignore_eos": True}
            asked = asyncio.ensure_future(connection.request("POST", "/v1/completions", body, headers))
            busy: list[str] = []

            async def is_served() -> bool:
                for name, address in stack.fleet.urls.items():
                    if (await get(address, "/load"))[1] == b'{"server_load":1}':
                        busy.append(name)
                return bool(busy)

            assert await eventually(is_served, 10)
            (gateway,) = [each for each in stack.fleet.of_kind("gateway") if each.name == busy[0]]
            assert gateway.kill()
            answer = await asked
            assert answer.status == status, await answer.body()
        finally:
            connection.close()


async def test_errors_ids_and_large_prompts_pass_unchanged(nginx_program: str, tmp_path: Path) -> None:
    async with running(nginx_program, tmp_path, TWO_GATEWAYS._replace(gateways=1)) as stack:
        connection = await Connection.open(stack.proxy)
        try:
            body = {"prompt": "word " * 200_000, "max_tokens": 5}
            answer = await connection.request("POST", "/v1/completions", body, {"X-Request-Id": "mine"})
            text = await answer.body()
            assert (answer.status, answer.headers["x-request-id"]) == (400, "mine")
            assert b"context_length_exceeded" in text
            answer = await connection.request("GET", "/metrics")
            assert answer.status == 404
        finally:
            connection.close()


def test_the_example_of_tls_is_accepted(nginx_program: str, tmp_path: Path) -> None:
    configuration = _configure(tmp_path, [Address("127.0.0.1", 9)], 8080)
    example = re.compile(r"^    # server \{\n(?:    # .*\n)*?    # \}\n", re.MULTILINE)
    text, count = example.subn(_uncommented, configuration.read_text())
    assert count == 1
    configuration.write_text(text.replace("/etc/sfllm/tls", str(tmp_path)))
    request = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=llm.example.com"),
        *("-keyout", str(tmp_path / "tls.key"), "-out", str(tmp_path / "tls.crt")),
    ]
    subprocess.run(request, capture_output=True, timeout=60, check=True)
    command = [nginx_program, "-t", "-c", str(configuration)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr


def _uncommented(example: re.Match[str]) -> str:
    return re.sub(r"^    # ?", "    ", example[0], flags=re.MULTILINE)
