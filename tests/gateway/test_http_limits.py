"""Deadlines and bounds on memory: what a request may ask for, and what it gets instead."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
import requests
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess
from http_client import begin, complete, error, events, open_stream, post, read_all, rest, wait_until

from sfllm.messages import Cancel, Rejected, Submit

COMPLETIONS = "/v1/completions"
HEADER = "X-Request-Timeout"
ENDPOINTS = [COMPLETIONS, "/v1/chat/completions", "/generate"]


def milliseconds_left(scheduler: FakeScheduler) -> int:
    submit = scheduler.wait_for(Submit)[-1]
    assert isinstance(submit, Submit)
    return submit.milliseconds_left


@pytest.mark.parametrize("value", ["0", "0.0", "-1", "soon", "", "1e3", "inf", "nan", "1,5", "9" * 400, "٣"])
def test_a_timeout_that_is_no_time_is_400(gateway: GatewayProcess, value: str) -> None:
    headers = {HEADER: value.encode()}
    found = error(post(gateway, COMPLETIONS, {"prompt": "x"}, headers=headers), 400)
    assert (found["code"], found["param"]) == ("invalid_request", HEADER)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_endpoint_that_generates_documents_the_timeout(gateway: GatewayProcess, path: str) -> None:
    document = requests.get(f"{gateway.url}/openapi.json", timeout=5).json()
    (parameter,) = document["paths"][path]["post"]["parameters"]
    assert (parameter["name"], parameter["in"]) == (HEADER, "header")


@pytest.mark.parametrize("value", ["50", "50.", "50.0"])
def test_the_time_that_is_left_at_submission_counts_from_arrival(
    gateway: GatewayProcess, scheduler: FakeScheduler, value: str
) -> None:
    answer = post(gateway, COMPLETIONS, {"prompt": "say:x"}, headers={HEADER: value})
    assert answer.status_code == 200
    assert 0 < milliseconds_left(scheduler) < 50_000


@pytest.mark.parametrize("streaming", [True, False])
def test_a_requests_own_deadline_ends_it(
    gateway: GatewayProcess, scheduler: FakeScheduler, streaming: bool
) -> None:
    scheduler.script.pause_at = 2
    body = {"prompt": "x", "stream": streaming}
    answer = post(gateway, COMPLETIONS, body, headers={HEADER: ".3"})
    if streaming:
        assert events(answer)[-1]["error"]["code"] == "deadline_exceeded"
    else:
        assert error(answer, 504)["type"] == "timeout_error"
    scheduler.wait_for(Cancel)


def test_a_later_deadline_than_the_latest_becomes_the_latest(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    gateway = start(own_scheduler, "--max-request-timeout-seconds=5")
    gateway.wait_ready()
    assert post(gateway, COMPLETIONS, {"prompt": "say:x"}, headers={HEADER: "100"}).status_code == 200
    assert milliseconds_left(own_scheduler) <= 5_000


def test_the_deadline_counts_while_the_body_comes(gateway: GatewayProcess) -> None:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n{HEADER}: 0.3\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as client:
        client.sendall(head.encode() + b"Content-Length: 100\r\n\r\n{")
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "deadline_exceeded"


# bytes of journals


@pytest.fixture
def small(own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]) -> GatewayProcess:
    """A gateway that keeps at most 1 MiB."""
    gateway = start(own_scheduler, f"--max-journal-bytes={2**20}")
    gateway.wait_ready()
    return gateway


def large(n: int, **fields: Any) -> dict[str, Any]:
    """About 86 kB for each of `n` choices."""
    return {"prompt": "x", "max_tokens": 500, "n": n, "logprobs": 20, **fields}


def test_open_requests_share_a_bound_of_bytes(small: GatewayProcess, own_scheduler: FakeScheduler) -> None:
    own_scheduler.script.pause_at = 1
    first, _ = open_stream(small, **large(8))
    reserved = small.metric("gateway_journal_bytes")
    assert reserved == 4 * 1 + 8 * (4096 + 500 * (4 + 8 * 21))
    refused = post(small, COMPLETIONS, large(8))
    assert error(refused, 429)["type"] == "overloaded_error"
    assert refused.headers["Retry-After"] == "1"
    assert small.metric("gateway_journal_bytes") == reserved
    first.close()
    wait_until(lambda: small.metric("gateway_journal_bytes") == 0, "not freed by a client that left")
    own_scheduler.resume()
    complete(small, **large(8))
    assert small.metric("gateway_journal_bytes") == 0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n": 14}, "max_tokens or n or logprobs"),
        ({"n": 1, "prompt": ["x"] * 14}, "max_tokens or prompt or logprobs"),
        ({"n": 120, "prompt_logprobs": 9, "prompt": "x" * 400}, "max_tokens or n or logprobs or prompt_"),
    ],
)
def test_a_request_that_no_gateway_could_keep_is_told_what_to_lower(
    small: GatewayProcess, fields: dict[str, Any], named: str
) -> None:
    found = error(post(small, COMPLETIONS, {**large(1), **fields}), 400)
    assert found["param"] == "max_tokens"
    assert f"lower {named}" in found["message"]


def test_bytes_are_freed_however_a_request_ends(small: GatewayProcess, own_scheduler: FakeScheduler) -> None:
    complete(small, prompt="say:x")
    own_scheduler.script.reject = Rejected(0, 0, "queue_full", "full", 1.0)
    assert post(small, COMPLETIONS, {"prompt": "x"}).status_code == 429
    own_scheduler.script.reject = None
    own_scheduler.script.pause_at = 1
    post(small, COMPLETIONS, {"prompt": "x", "stream": True}, headers={HEADER: "0.2"})
    client = begin(small, COMPLETIONS, {"prompt": "x"})
    wait_until(lambda: small.metric("gateway_journal_bytes") > 0, "not submitted")
    client.close()
    wait_until(lambda: small.metric("gateway_journal_bytes") == 0, "not freed")
    own_scheduler.script.interrupt_at = [1]
    own_scheduler.script.suspects = 1
    _, lines = open_stream(small)
    own_scheduler.resume()
    rest(lines)
    assert small.metric("gateway_journal_bytes") == 0
