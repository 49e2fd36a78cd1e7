"""A client that does not read: its gateway keeps numbers for it, no text, and serves everybody else."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess
from http_client import complete, finish_reasons, stream, text_of, wait_until

from sfllm.messages import Submit

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
CHOICES, TOKENS = 64, 400
MEBIBYTE = 2**20


def large(n: int) -> dict[str, Any]:
    fields = {"stream": True, "n": n, "max_tokens": TOKENS, "logprobs": True, "top_logprobs": 20}
    return {"messages": [{"role": "user", "content": "x"}], **fields}


@contextlib.contextmanager
def sleeping_client(gateway: GatewayProcess) -> Iterator[socket.socket]:
    """Asks for some 30 MB of log probabilities, and reads nothing of them."""
    body = json.dumps(large(CHOICES)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(60)
        client.connect(("127.0.0.1", gateway.port))
        client.sendall(head.encode() + body)
        yield client


@pytest.fixture
def busy(own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]) -> GatewayProcess:
    gateway = start(own_scheduler)
    gateway.wait_ready()
    own_scheduler.script.tokens_per_message = 10
    stream(gateway, CHAT, **large(4))  # what any such request needs once
    return gateway


def test_a_client_that_does_not_read_costs_no_memory_but_its_journal(
    busy: GatewayProcess, own_scheduler: FakeScheduler
) -> None:
    before = busy.resident_bytes()
    with sleeping_client(busy) as client:
        own_scheduler.wait_for(Submit, 2)
        wait_until(lambda: own_scheduler.running == 0, "not generated", 60)
        for number in range(20):  # by now all is in the journal, and nobody is kept waiting
            assert complete(busy, prompt=f"say:{number}")["choices"][0]["text"] == str(number)
            assert text_of(stream(busy, COMPLETIONS, prompt=f"say:{number}")) == str(number)
        assert busy.metric("gateway_open_requests") == 1
        assert busy.resident_bytes() < before + 16 * MEBIBYTE
        answer = http.client.HTTPResponse(client)
        answer.begin()
        received = answer.read()
        assert busy.resident_bytes() < before + 16 * MEBIBYTE
    assert len(received) > 16 * MEBIBYTE
    chunks = [json.loads(line[6:]) for line in received.split(b"\n\n") if line.startswith(b"data: {")]
    for choice in range(CHOICES):
        assert len(text_of(chunks, choice)) == TOKENS
        assert finish_reasons(chunks, choice) == ["length"]


def test_a_sleeping_client_that_leaves_frees_its_journal(
    busy: GatewayProcess, own_scheduler: FakeScheduler
) -> None:
    with sleeping_client(busy):
        own_scheduler.wait_for(Submit, 2)
        wait_until(lambda: busy.metric("gateway_journal_bytes") > 0, "not submitted")
    wait_until(lambda: busy.metric("gateway_open_requests") == 0, "still open")
    assert busy.metric("gateway_journal_bytes") == 0
