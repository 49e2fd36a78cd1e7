"""Log lines of all three services lead to the client's own trace, though no collector is there."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from log_lines import OF_EVERY_REQUEST, logged
from running_stack import RunningStack

TRACE = "5" * 32


@pytest.fixture(scope="module")
def stack() -> Iterator[RunningStack]:
    running = RunningStack("--mock", "--log-format=json", "--log-level=debug")
    running.wait_until_ready()
    yield running
    assert running.stop() == 0


@pytest.fixture
def connection(stack: RunningStack) -> Iterator[http.client.HTTPConnection]:
    opened = http.client.HTTPConnection(urlsplit(stack.url).netloc, timeout=60)
    yield opened
    opened.close()


def ask(connection: http.client.HTTPConnection, request_id: str, **headers: str) -> None:
    body = json.dumps({"prompt": "Once", "max_tokens": 2})
    kind = {"Content-Type": "application/json", "X-Request-Id": request_id}
    connection.request("POST", "/v1/completions", body, kind | headers)
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200


@pytest.mark.parametrize("flags", ["00", "01"])
def test_each_line_about_a_request_names_the_trace_that_its_client_is_in(
    stack: RunningStack, connection: http.client.HTTPConnection, flags: str
) -> None:
    request_id = f"of-a-trace-{flags}"
    ask(connection, request_id, traceparent=f"00-{TRACE}-{'c' * 16}-{flags}")
    lines = logged(stack, request_id, OF_EVERY_REQUEST)
    assert {line["service"] for line in lines} == {"gateway", "scheduler", "worker"}
    assert {line.get("trace_id") for line in lines} == {TRACE}


@pytest.mark.parametrize("headers", [{}, {"traceparent": "nonsense"}, {"traceparent": f"00-{'0' * 32}-1-01"}])
def test_a_request_of_no_trace_is_known_by_its_own_id_even_after_another_on_its_connection(
    stack: RunningStack, connection: http.client.HTTPConnection, headers: dict[str, str]
) -> None:
    ask(connection, "one-before", traceparent=f"00-{TRACE}-{'c' * 16}-01")
    request_id = f"of-no-trace-{len(str(headers))}"
    ask(connection, request_id, **headers)
    lines = logged(stack, request_id, OF_EVERY_REQUEST)
    assert {line["service"] for line in lines} == {"gateway", "scheduler", "worker"}
    assert not [line for line in lines if "trace_id" in line]
