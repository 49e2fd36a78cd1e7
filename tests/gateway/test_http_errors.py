"""Every way to ask wrongly, and what a real gateway process says to it."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import requests
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess
from http_client import error, events, post, text_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfllm.messages import Rejected
from sfllm_gateway.openai.unbuilt import UNBUILT

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ENDPOINTS = (CHAT, COMPLETIONS, "/generate")
MESSAGES = [{"role": "user", "content": "x"}]


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": False}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_new_tokens": -1}, "max_new_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stop": [3]}, "stop[0]"),
    ({"stop_token_ids": [259]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"priority": 2**31}, "priority"),
    ({"model": 3}, "model"),
    ({"user": 3}, "user"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"request_id": "é"}, "request_id"),
    ({"request_id": "x" * 257}, "request_id"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS)
@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": "x"})])
def test_a_bad_value_is_400_and_names_its_field(
    gateway: GatewayProcess, path: str, body: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    found = error(post(gateway, path, {**body, **fields}), 400)
    assert found["param"] == param
    assert found["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        (
            CHAT,
            {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
        (COMPLETIONS, {"prompt": [259]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": [True]}, "prompt[0]"),
        (COMPLETIONS, {"prompt": ["x"] * 100, "n": 100}, "prompt"),
        ("/generate", {}, "text"),
        ("/generate", {"text": "a", "input_ids": [1]}, "text"),
        ("/generate", {"input_ids": [300]}, "input_ids"),
        ("/generate", {"text": "a", "sampling_params": {"temperature": 3}}, "sampling_params.temperature"),
        ("/generate", {"text": "a", "sampling_params": {"stop": ""}}, "sampling_params.stop"),
        ("/generate", {"text": "a", "sampling_params": []}, "sampling_params"),
    ],
)
def test_a_missing_or_contradictory_field_is_400_and_named(
    gateway: GatewayProcess, path: str, body: dict[str, Any], param: str
) -> None:
    assert error(post(gateway, path, body), 400)["param"] == param


WANTED: dict[str, Any] = dict.fromkeys(UNBUILT, 3) | {
    "tools": [{"type": "function"}],
    "response_format": {"type": "json_object"},
    "parallel_tool_calls": "x",
}


@pytest.mark.parametrize("name", sorted(UNBUILT))
def test_a_known_field_that_is_not_built_is_501_and_never_ignored(gateway: GatewayProcess, name: str) -> None:
    found = error(post(gateway, COMPLETIONS, {"prompt": "x", name: WANTED[name]}), 501)
    assert (found["param"], found["type"]) == (name, "not_implemented_error")
    for neutral in (None, *UNBUILT[name]):
        answer = post(gateway, COMPLETIONS, {"prompt": "x", "max_tokens": 1, name: neutral})
        assert answer.status_code == 200, answer.text
        assert "X-Sfllm-Ignored-Fields" not in answer.headers


def test_true_is_not_one(gateway: GatewayProcess) -> None:
    error(post(gateway, COMPLETIONS, {"prompt": "x", "best_of": True}), 501)
    assert error(post(gateway, COMPLETIONS, {"prompt": "x", "logprobs": True}), 400)["param"] == "logprobs"


def test_parts_that_are_no_text_are_501(gateway: GatewayProcess) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    found = error(post(gateway, CHAT, {"messages": [{"role": "user", "content": [part]}]}), 501)
    assert found["param"] == "messages[0].content[0].type"


@pytest.mark.parametrize("path", ENDPOINTS)
def test_an_unknown_model_is_404(gateway: GatewayProcess, path: str) -> None:
    body = {"model": "nope" * 200, "messages": MESSAGES, "prompt": "x", "text": "x"}
    found = error(post(gateway, path, body), 404)
    assert (found["type"], found["param"]) == ("not_found_error", "model")
    assert len(found["message"]) < 300


def test_a_prompt_longer_than_the_context_says_both_lengths(gateway: GatewayProcess) -> None:
    found = error(post(gateway, COMPLETIONS, {"prompt": "x" * 600}), 400)
    assert (found["code"], found["param"]) == ("context_length_exceeded", "prompt")
    assert "600" in found["message"]
    assert "512" in found["message"]
    error(post(gateway, COMPLETIONS, {"prompt": "x" * 512}), 400)
    assert post(gateway, COMPLETIONS, {"prompt": "x" * 511}).json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_413(gateway: GatewayProcess, chunked: bool) -> None:
    body = json.dumps({"prompt": "x" * 70_000}).encode()
    data: Any = iter([body[:40_000], body[40_000:]]) if chunked else body
    assert error(post(gateway, COMPLETIONS, data=data), 413)["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("content_type", "status"),
    [("application/json; charset=utf-8", 200), ("APPLICATION/JSON", 200), ("text/plain", 400)],
)
def test_only_json_is_taken(gateway: GatewayProcess, content_type: str, status: int) -> None:
    headers = {"Content-Type": content_type}
    answer = post(gateway, COMPLETIONS, data=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == status
    assert post(gateway, COMPLETIONS, data=b'{"prompt": "x"}').status_code == 200


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("queue_full", 429, "overloaded_error"),
        ("service_unavailable", 503, "service_unavailable_error"),
        ("deadline_exceeded", 504, "timeout_error"),
        ("engine_failure", 500, "server_error"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_the_scheduler_refuses_keeps_its_status_even_for_a_stream(
    gateway: GatewayProcess, scheduler: FakeScheduler, code: str, status: int, kind: str, streaming: bool
) -> None:
    scheduler.script.reject = Rejected(0, 0, code, "not now", 1.2)
    answer = post(gateway, CHAT, {"messages": MESSAGES, "stream": streaming})
    request_id = answer.headers["X-Request-Id"]
    message = f"not now (request {request_id})" if code == "engine_failure" else "not now"
    assert error(answer, status) == {"message": message, "type": kind, "param": None, "code": code}
    assert answer.headers["Retry-After"] == "2"


def test_more_open_requests_than_allowed_are_429(gateway: GatewayProcess, scheduler: FakeScheduler) -> None:
    scheduler.script.pause_at = 1
    body = {"prompt": "x", "stream": True, "max_tokens": 2}
    held = [requests.post(gateway.url + COMPLETIONS, json=body, stream=True, timeout=20) for _ in range(8)]
    answer = post(gateway, COMPLETIONS, body)
    assert error(answer, 429)["type"] == "overloaded_error"
    assert int(answer.headers["Retry-After"]) >= 1
    scheduler.resume()
    assert [text_of(events(stream)) for stream in held] == ["ab"] * 8


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v1/models/", "/healthz", "/v1/models/a/b"])
def test_an_unknown_path_is_404(gateway: GatewayProcess, path: str) -> None:
    assert error(requests.get(gateway.url + path, timeout=5), 404)["type"] == "not_found_error"


@pytest.mark.parametrize(("method", "path"), [("GET", CHAT), ("DELETE", "/v1/models"), ("POST", "/health")])
def test_a_wrong_method_is_405_and_says_which_is_right(
    gateway: GatewayProcess, method: str, path: str
) -> None:
    answer = requests.request(method, gateway.url + path, timeout=5)
    assert error(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["Allow"]


def test_bytes_that_are_no_http_end_only_their_own_connection(gateway: GatewayProcess) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as client:
        client.sendall(b"\x00\x01 nonsense\r\n\r\n")
        assert b"400" in client.recv(4096)
    assert requests.get(f"{gateway.url}/health", timeout=5).status_code == 200


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        "model",
        "n",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "temperature",
        "top_k",
        "user",
        "max_tokens",
        "messages",
        "prompt",
        "text",
        "sampling_params",
        "chat_template_kwargs",
        "request_id",
        "priority",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(ENDPOINTS), fields=st.dictionaries(NAMES, JSON, max_size=4))
def test_whatever_a_body_holds_the_answer_is_never_500_or_422(
    gateway: GatewayProcess, path: str, fields: dict[str, Any]
) -> None:
    body = {"messages": MESSAGES, "prompt": "x", "text": "x", "max_tokens": 2, **fields}
    answer = post(gateway, path, body)
    assert answer.status_code in {200, 400, 404, 501}, answer.text
    if answer.status_code != 200:
        error(answer, answer.status_code)
