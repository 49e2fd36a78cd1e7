"""Nothing in a gateway grows with what clients send or with how long it runs."""

from __future__ import annotations

import asyncio
import json
import socket
from array import array

import msgspec
import pytest
from fake_scheduler import ASSET_FILES, FakeScheduler, byte_tokenizer, model_card
from gateway_process import GatewayProcess
from http_client import complete, read_all, wait_until
from uvicorn.config import Config
from uvicorn.server import ServerState

from sfllm.messages import Asset, ModelState, Sampling, Timings
from sfllm.metrics import Metrics
from sfllm_gateway import connection
from sfllm_gateway.budget import journal_bytes
from sfllm_gateway.connection import MAX_HEAD_BYTES, MAX_PIPELINED, Connection
from sfllm_gateway.detokenize import Detokenizers
from sfllm_gateway.generation import Generation, Usage
from sfllm_gateway.grammars import GrammarPool, ModelGrammars
from sfllm_gateway.meter import RequestMeter
from sfllm_gateway.metrics import KEPT_MODELS, REASONS, GatewayMetrics
from sfllm_gateway.models import KEPT_UNUSED, LoadedModel, ModelRegistry, TextTools
from sfllm_gateway.rendering import RenderPool
from sfllm_gateway.tokenize import TextPool


def connect(gateway: GatewayProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), timeout=20)


def send_for_ever(client: socket.socket, piece: bytes) -> int:
    """Send until the other side hangs up; how many bytes it took, 64 MiB at most."""
    sent = 0
    try:
        while sent < 2**26:
            sent += client.send(piece)
    except OSError:
        pass
    return sent


@pytest.mark.parametrize(
    "piece", [b"X-Header: " + b"x" * 1000 + b"\r\n", b"x" * 1000], ids=["many headers", "a long header"]
)
def test_a_head_without_end_is_refused(gateway: GatewayProcess, piece: bytes) -> None:
    with connect(gateway) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")
        assert send_for_ever(client, piece) < 2**26
        read_all(client)
    complete(gateway, prompt="say:x")


def test_a_head_that_is_too_long_is_told_so(gateway: GatewayProcess) -> None:
    with connect(gateway) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nX: " + b"x" * MAX_HEAD_BYTES)
        status, _, rest = read_all(client).partition(b"\r\n")
    assert status == b"HTTP/1.1 400 Bad Request"
    found = json.loads(rest.partition(b"\r\n\r\n")[2])["error"]
    assert (found["type"], found["code"]) == ("invalid_request_error", "invalid_request")


def test_a_body_may_be_longer_than_a_head(gateway: GatewayProcess) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1, "user": "x" * (MAX_HEAD_BYTES - 8000)}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with connect(gateway) as client:
        for closing in ("", "Connection: close\r\n"):  # two on one connection
            client.sendall(f"{head}{closing}\r\n".encode())
            for start in range(0, len(body), 1000):
                client.sendall(body[start : start + 1000])
        assert read_all(client).count(b"HTTP/1.1 200 OK") == 2


def test_requests_that_are_sent_ahead_are_answered_in_order_up_to_a_bound(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    ahead = b"GET /v1/models/tiny HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(gateway) as client:
        client.sendall(ahead * MAX_PIPELINED + ahead.replace(b"Host", b"Connection: close\r\nHost"))
        assert read_all(client).count(b"HTTP/1.1 200 OK") == MAX_PIPELINED + 1
    scheduler.script.pause_at = 0
    body = b'{"prompt": "x"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with connect(gateway) as client:
        client.sendall(head + body)
        wait_until(lambda: scheduler.running == 1, "not submitted")
        assert send_for_ever(client, ahead * 100) < 2**26
    wait_until(lambda: gateway.metric("gateway_open_requests") == 0, "still open")


async def test_a_connection_that_sends_no_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.05)
    config = Config(lambda *_: None, http=Connection, log_config=None)
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
    async with server, asyncio.timeout(20):
        for begun in (b"", b"GET / HTTP/1.1\r\nHost:"):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(begun)
            assert await reader.read() == b""
            writer.close()
        assert not state.connections


def test_values_of_models_that_are_gone_are_forgotten() -> None:
    metrics = GatewayMetrics(Metrics("sfllm:"))
    for number in range(KEPT_MODELS + 3):
        meter = RequestMeter(metrics, f"model-{number}", "r", 0.0)
        meter.admitted(1, 1)
        meter.tokens(2, None)
        meter.tokens(2, 0.1)
        meter.ended(Usage(1, 4), ["stop"], [Timings()], 1, 4)
        for reason in REASONS:
            meter.ended(Usage(1, 4), [reason], [], 0, 4)
    text = metrics.registry.render().decode()
    for number in range(3):
        assert f'"model-{number}"' not in text
    assert f'"model-{KEPT_MODELS}"' in text
    assert "model-3" in text


async def test_of_the_models_that_are_gone_only_the_last_few_stay_loaded() -> None:
    pulled: list[str] = []
    contents = {asset.name: ASSET_FILES[asset.name] for asset in model_card().assets}

    async def pull(asset: Asset) -> bytes:
        pulled.append(asset.name)
        return contents.get(asset.name, b"")

    async def serve(number: int) -> None:
        card = model_card("m", ())
        mark = Asset(f"mark-{number}", "", 0)  # makes it another model
        registry.update([ModelState(msgspec.structs.replace(card, assets=(*card.assets, mark)), 1)])
        async with asyncio.timeout(60):
            while registry.problem() is not None:  # noqa: ASYNC110 - a registry tells nobody
                await asyncio.sleep(0.005)

    pool, renderers, grammars = TextPool(), RenderPool(), GrammarPool()
    registry = ModelRegistry(pull, pool, renderers, grammars, lambda: None)
    registry.start()
    try:
        for number in [*range(KEPT_UNUSED + 2), KEPT_UNUSED, 0]:
            await serve(number)
    finally:
        await registry.close()
        await renderers.close()
        await grammars.close()
        pool.close()
    assert pulled.count(f"mark-{KEPT_UNUSED}") == 1
    assert pulled.count("mark-0") == 2


def test_a_request_reserves_what_its_prompts_and_choices_may_need() -> None:
    sampling = Sampling(max_tokens=10, seed=1, logprobs=2, prompt_logprobs=0)
    tokenizer = byte_tokenizer()
    grammars = ModelGrammars(GrammarPool(), tokenizer)
    model = LoadedModel(model_card(), TextTools(tokenizer, Detokenizers(tokenizer), None, {}, grammars))
    prompts = [array("I", [1] * 7), array("I", [1])]
    generation = Generation(model, prompts, 3, [sampling, Sampling(max_tokens=5, seed=1, grammar="g" * 9)])
    first = 7 * (4 + 3 * 8) + 3 * (4096 + 10 * (4 + 3 * 8))
    assert journal_bytes(generation) == first + 4 + 9 + 3 * (4096 + 5 * 4)
