"""A whole sfllm with mock workers that sends its spans to a collector."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from log_lines import OF_EVERY_REQUEST, logged
from otlp_receiver import OtlpReceiver, ReceivedSpan
from running_stack import RunningStack

from sfllm_gateway.endpoints import ENDPOINTS
from sfllm_gateway.traces import OPERATIONS

SERVER_SPAN, INTERNAL_SPAN = 2, 1
POISON = 7
CLOCK_SECONDS = 0.005
"""Every process makes times of day of its own: they may differ by so much on one machine."""

STAGES = {
    ("sfllm-gateway", "chat mock"),
    ("sfllm-gateway", "tokenize"),
    ("sfllm-scheduler", "queue"),
    ("sfllm-worker", "wait for room"),
    ("sfllm-worker", "prefill"),
    ("sfllm-worker", "decode"),
    ("sfllm-gateway", "detokenize"),
}


@pytest.fixture(scope="module")
def stack(receiver: OtlpReceiver) -> Iterator[RunningStack]:
    running = RunningStack(
        "--mock",
        f"--mock-poison-token={POISON}",
        f"--otlp-endpoint={receiver.url}",
        "--log-format=json",
        "--log-level=debug",
    )
    running.wait_until_ready()
    yield running
    assert running.stop() == 0


def trace_of(number: int) -> str:
    return f"{number:032x}"


def post(
    stack: RunningStack, path: str, body: object, trace_id: str, on_text: Callable[[], None] | None = None
) -> int:
    """The status of a request in a trace of its client; `on_text` is called at its first text."""
    headers = {"Content-Type": "application/json", "traceparent": f"00-{trace_id}-{'c' * 16}-01"}
    request = urllib.request.Request(stack.url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            for line in answer:
                if on_text is not None and b'"content":"' in line and b'"content":""' not in line:
                    on_text()
                    on_text = None
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def chat(tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Say something"}]
    return {"messages": messages, "max_tokens": tokens, "stream": True, "seed": 1}


def has(*names: str) -> Callable[[list[ReceivedSpan]], bool]:
    """Whether as many spans of each name have come."""
    wanted = Counter(names)
    return lambda spans: wanted <= Counter(span.name.partition(" ")[0] for span in spans)


def root_of(spans: list[ReceivedSpan]) -> ReceivedSpan:
    (root,) = (span for span in spans if span.kind == SERVER_SPAN)
    return root


def test_a_streamed_request_is_one_trace_through_all_services(
    stack: RunningStack, receiver: OtlpReceiver
) -> None:
    trace_id = trace_of(1)
    assert post(stack, "/v1/chat/completions", chat(tokens=8), trace_id) == 200
    spans = receiver.wait_for(trace_id, lambda spans: len(spans) >= len(STAGES), stack.log)
    assert {(span.service, span.name) for span in spans} == STAGES
    assert len(spans) == len(STAGES)
    assert receiver.paths == {"/v1/traces"}
    assert not any(span.failed for span in spans)

    root = root_of(spans)
    assert root.parent_id == "c" * 16, "the client's span is above the request"
    children = {span.name: span for span in spans if span is not root}
    assert {span.parent_id for span in children.values()} == {root.span_id}
    assert {span.kind for span in children.values()} == {INTERNAL_SPAN}
    for span in children.values():
        assert root.started - CLOCK_SECONDS <= span.started <= span.ended <= root.ended + CLOCK_SECONDS, span
    stages = [children[name] for name in ("tokenize", "queue", "wait for room", "prefill", "decode")]
    for before, after in pairwise(stages):
        assert before.ended <= after.started + CLOCK_SECONDS, (before, after)
    decode = children["decode"]
    assert decode.ended - decode.started >= 7 / 50 * 0.9, "seven tokens at 50 a second"
    assert len({span.resource["service.instance.id"] for span in spans}) == 3
    assert children["queue"].attributes["sfllm.worker"] == decode.resource["service.instance.id"]


def test_attributes_are_those_of_the_conventions_and_hold_no_text(
    stack: RunningStack, receiver: OtlpReceiver
) -> None:
    trace_id = trace_of(2)
    assert post(stack, "/v1/chat/completions", chat(tokens=5) | {"top_p": 0.5}, trace_id) == 200
    spans = receiver.wait_for(trace_id, has("chat", "decode"), stack.log)
    found = root_of(spans).attributes
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "sfllm",
        "gen_ai.request.model": "mock",
        "gen_ai.response.model": "mock",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.seed": 1,
        "gen_ai.request.stream": True,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ["length"],
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    assert found | expected == found
    assert found["gen_ai.usage.input_tokens"] > 10
    assert found["gen_ai.response.time_to_first_chunk"] > 0
    assert found["gen_ai.response.id"].startswith("chatcmpl-")
    assert "error.type" not in found
    assert "Say something" not in str(spans)


def test_a_request_without_traceparent_begins_a_trace_that_its_logs_name(
    stack: RunningStack, receiver: OtlpReceiver
) -> None:
    request = urllib.request.Request(
        f"{stack.url}/v1/completions",
        json.dumps({"prompt": "Once", "max_tokens": 2}).encode(),
        {"Content-Type": "application/json", "X-Request-Id": "named-by-me", "traceparent": "nonsense"},
    )
    urllib.request.urlopen(request, timeout=60).close()
    lines = logged(stack, "named-by-me", OF_EVERY_REQUEST)
    (trace_id,) = {line["trace_id"] for line in lines}
    assert re.fullmatch("[0-9a-f]{32}", trace_id)
    spans = receiver.wait_for(trace_id, has("text_completion", "queue", "decode"), stack.log)
    assert root_of(spans).parent_id == ""


def test_a_client_may_ask_not_to_be_traced(stack: RunningStack, receiver: OtlpReceiver) -> None:
    silent, heard = trace_of(4), trace_of(5)
    request = urllib.request.Request(
        f"{stack.url}/v1/completions",
        json.dumps({"prompt": "Once", "max_tokens": 2}).encode(),
        {"Content-Type": "application/json", "traceparent": f"00-{silent}-{'c' * 16}-00"},
    )
    urllib.request.urlopen(request, timeout=60).close()
    assert post(stack, "/v1/completions", {"prompt": "Once", "max_tokens": 2}, heard) == 200
    receiver.wait_for(heard, has("text_completion", "queue", "decode"), stack.log)
    assert receiver.of(silent) == []


def test_a_request_that_is_refused_names_its_error(stack: RunningStack, receiver: OtlpReceiver) -> None:
    trace_id = trace_of(6)
    assert post(stack, "/v1/completions", {"prompt": "Once", "temperature": 9}, trace_id) == 400
    (root,) = receiver.wait_for(trace_id, has("text_completion"), stack.log)
    assert root.attributes["error.type"] == "invalid_request"
    assert root.attributes["http.response.status_code"] == 400
    assert not root.failed, "a client's mistake is no failure of the server"


def test_a_stream_that_is_cancelled_ends_its_decode(stack: RunningStack, receiver: OtlpReceiver) -> None:
    trace_id = trace_of(7)

    def leave() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        post(stack, "/v1/chat/completions", chat(tokens=3000), trace_id, on_text=leave)
    spans = receiver.wait_for(trace_id, has("chat", "decode"), stack.log)
    assert root_of(spans).attributes["gen_ai.response.finish_reasons"] == ["abort"]
    (decode,) = (span for span in spans if span.name == "decode")
    assert decode.attributes["sfllm.end"] == "cancelled"


def test_an_attempt_on_a_worker_that_is_killed_and_the_next_one_are_both_there(
    stack: RunningStack, receiver: OtlpReceiver
) -> None:
    trace_id = trace_of(8)

    def kill() -> None:
        (worker,) = stack.worker_pids()
        os.kill(worker, signal.SIGKILL)

    assert post(stack, "/v1/chat/completions", chat(tokens=60), trace_id, on_text=kill) == 200
    spans = receiver.wait_for(trace_id, has("chat", "queue", "queue", "lost", "prefill", "decode"), stack.log)
    root = root_of(spans)
    assert root.attributes["gen_ai.usage.output_tokens"] == 60
    first, second = (span for span in spans if span.name == "queue")
    (lost,) = (span for span in spans if span.name == "lost attempt")
    (decode,) = (span for span in spans if span.name == "decode")
    assert [span.attributes["sfllm.attempt"] for span in (first, lost, second, decode)] == [0, 0, 1, 1]
    assert lost.failed
    assert lost.attributes["sfllm.cause"] == "unreachable"
    assert first.attributes["sfllm.worker"] != second.attributes["sfllm.worker"]
    assert decode.attributes["sfllm.worker"] == second.attributes["sfllm.worker"]
    assert {span.parent_id for span in (first, lost, second, decode)} == {root.span_id}
    assert not root.failed, "its client saw none of it"


def test_a_request_that_fails_shows_every_attempt(stack: RunningStack, receiver: OtlpReceiver) -> None:
    trace_id = trace_of(9)
    body = {"prompt": [POISON, 65], "max_tokens": 3}
    assert post(stack, "/v1/completions", body, trace_id) == 500
    spans = receiver.wait_for(trace_id, has("text_completion", "queue", "queue", "lost", "lost"), stack.log)
    root = root_of(spans)
    assert root.failed
    assert root.attributes["error.type"] == "engine_failure"
    assert root.attributes["http.response.status_code"] == 500
    assert not any(span.name == "decode" for span in spans)


def test_every_endpoint_that_generates_is_traced() -> None:
    assert set(OPERATIONS) == {endpoint.path for endpoint in ENDPOINTS}
