"""`/v1/messages` over HTTP: answers, the order of events, and errors in Anthropic's shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import requests
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess
from http_client import post

from sfllm.messages import Cancel, Rejected, Submit

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"


def body(says: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"max_tokens": 26, "messages": [{"role": "user", "content": f"say:{says}|"}], **fields}


def events(answer: requests.Response) -> list[dict[str, Any]]:
    """The events of a stream, each of which names its type twice."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            continue
        first, second = block.split("\n")
        data = json.loads(second.removeprefix("data: "))
        assert first == f"event: {data['type']}"
        found.append(data)
    return found


def error(answer: requests.Response, status: int) -> dict[str, Any]:
    """The error of an answer of this status, its shape checked."""
    assert answer.status_code == status, answer.text
    found = answer.json()
    assert set(found) == {"type", "error", "request_id"}
    assert found["type"] == "error"
    assert found["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    assert set(found["error"]) == {"type", "message"}
    inner: dict[str, Any] = found["error"]
    return inner


def test_a_message_has_the_documented_form(gateway: GatewayProcess, scheduler: FakeScheduler) -> None:
    scheduler.script.cached_tokens = 9
    answer = post(
        gateway, MESSAGES, body(), headers={"x-request-id": "one", "anthropic-version": "2023-06-01"}
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["request-id"] == "one"
    assert answer.json() == {
        "id": "msg_one",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 20,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 9,
            "output_tokens": 5,
        },
    }


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("fields", "text", "reason", "sequence"),
    [
        ({}, "hello", "end_turn", None),
        ({"max_tokens": 3}, "hel", "max_tokens", None),
        ({"stop_sequences": ["x", "lo"]}, "hel", "stop_sequence", "lo"),
        ({"stop_sequences": ["x"]}, "hello", "end_turn", None),
    ],
)
def test_a_message_says_why_it_ended(
    gateway: GatewayProcess,
    fields: dict[str, Any],
    text: str,
    reason: str,
    sequence: str | None,
    streaming: bool,
) -> None:
    answer = post(gateway, MESSAGES, body(**fields, stream=streaming))
    if streaming:
        found = events(answer)
        said = "".join(event["delta"]["text"] for event in found if event["type"] == "content_block_delta")
        end = found[-2]["delta"]
    else:
        end = answer.json()
        said = end["content"][0]["text"]
    assert (said, end["stop_reason"], end["stop_sequence"]) == (text, reason, sequence)


def test_the_events_of_a_stream_come_in_the_documented_order(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    scheduler.script.cached_tokens = 9
    found = events(post(gateway, MESSAGES, body(stream=True), headers={"x-request-id": "two"}))
    kinds = [event["type"] for event in found]
    deltas = kinds.count("content_block_delta")
    assert deltas >= 1
    assert kinds == [
        *("message_start", "ping", "content_block_start"),
        *["content_block_delta"] * deltas,
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    start = found[0]["message"]
    assert (start["id"], start["content"], start["stop_reason"]) == ("msg_two", [], None)
    assert start["usage"]["input_tokens"] == 29
    assert found[2] == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    assert all(event["index"] == 0 for event in found[2:-2])
    assert found[-2]["usage"] == {
        "input_tokens": 20,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 9,
        "output_tokens": 5,
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_a_message_without_text_has_no_blocks(gateway: GatewayProcess, streaming: bool) -> None:
    answer = post(gateway, MESSAGES, body("", stream=streaming))
    if streaming:
        kinds = [event["type"] for event in events(answer)]
        assert kinds == ["message_start", "ping", "message_delta", "message_stop"]
    else:
        assert (answer.json()["content"], answer.json()["stop_reason"]) == ([], "end_turn")


def test_the_conversation_is_rendered_as_the_chat_that_it_stands_for(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "say:x|"},
        {"role": "assistant", "content": "begun"},
    ]
    assert post(gateway, MESSAGES, {"max_tokens": 2, "system": "s", "messages": turns}).status_code == 200
    shown = "".join({256: "<", 257: ">"}.get(token) or chr(token) for token in scheduler.prompts[-1])
    assert shown == "<system\ns>\n<user\na>\n<assistant\nb>\n<user\nsay:x|>\n<assistant\nbegun"


def test_the_prompt_is_counted_as_it_is_made(gateway: GatewayProcess, scheduler: FakeScheduler) -> None:
    wanted = body(system="Be brief.")
    count = post(gateway, COUNT, {name: wanted[name] for name in ("messages", "system")})
    assert post(gateway, MESSAGES, wanted).status_code == 200
    assert count.json() == {"input_tokens": len(scheduler.prompts[-1])}


def test_fields_without_effect_are_named(gateway: GatewayProcess) -> None:
    thinking = {"type": "enabled", "budget_tokens": 2000}
    answer = post(gateway, MESSAGES, body(thinking=thinking, colour=1, service_tier="auto"))
    assert answer.headers["X-Sfllm-Ignored-Fields"] == "colour, thinking.budget_tokens"


@pytest.mark.parametrize(
    ("status", "kind", "rejected"),
    [
        (529, "overloaded_error", "queue_full"),
        (429, "rate_limit_error", "rate_limit_exceeded"),
        (503, "overloaded_error", "service_unavailable"),
        (504, "timeout_error", "deadline_exceeded"),
        (500, "api_error", "engine_failure"),
    ],
)
def test_what_goes_wrong_behind_the_gateway_has_anthropics_shape(
    gateway: GatewayProcess, scheduler: FakeScheduler, status: int, kind: str, rejected: str
) -> None:
    scheduler.script.reject = Rejected(0, 0, rejected, "not now", 2.5)
    answer = post(gateway, MESSAGES, body())
    assert error(answer, status)["type"] == kind
    if status in {429, 503, 529}:
        assert answer.headers["Retry-After"] == "3"


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
@pytest.mark.parametrize(
    ("status", "kind", "sent"),
    [
        (400, "invalid_request_error", {"data": b'{"messages": '}),
        (400, "invalid_request_error", {"data": b"{}", "headers": {"Content-Type": "text/plain"}}),
        (400, "invalid_request_error", {"json": {"max_tokens": 5}}),
        (400, "invalid_request_error", {"json": {"max_tokens": 5, "messages": []}}),
        (404, "not_found_error", {"json": body(model="other")}),
        (413, "request_too_large", {"json": body("x" * 70_000)}),
        (501, "invalid_request_error", {"json": body(container="x")}),
    ],
)
def test_what_is_wrong_with_a_request_has_anthropics_shape(
    gateway: GatewayProcess, scheduler: FakeScheduler, path: str, status: int, kind: str, sent: dict[str, Any]
) -> None:
    found = error(requests.post(gateway.url + path, timeout=20, **sent), status)
    assert found["type"] == kind
    assert not scheduler.of(Submit)


def test_an_image_is_refused_by_name(gateway: GatewayProcess) -> None:
    image = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
    found = error(post(gateway, MESSAGES, body(messages=[{"role": "user", "content": [image]}])), 501)
    assert found["message"].startswith("messages[0].content[0].type: blocks of type 'image'")


def test_a_prompt_longer_than_the_context_is_refused(gateway: GatewayProcess) -> None:
    assert "context is 512" in error(post(gateway, MESSAGES, body("x" * 600)), 400)["message"]


def test_paths_below_answer_in_the_same_shape_and_others_do_not(gateway: GatewayProcess) -> None:
    assert error(post(gateway, f"{MESSAGES}/batches", {}), 404)["type"] == "not_found_error"
    assert error(requests.get(gateway.url + MESSAGES, timeout=20), 405)["type"] == "invalid_request_error"
    other = post(gateway, "/v1/messagesx", {})
    assert set(other.json()) == {"error"}
    assert "request-id" not in other.headers


def test_a_key_is_needed_where_keys_are_and_x_api_key_is_one(
    scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    closed = start(scheduler, "--api-key=sk-secret")
    closed.wait_ready()
    assert error(post(closed, MESSAGES, body()), 401)["type"] == "authentication_error"
    wrong = post(closed, COUNT, body(), headers={"x-api-key": "sk-other"})
    assert error(wrong, 401)["type"] == "authentication_error"
    for headers in ({"x-api-key": "sk-secret"}, {"Authorization": "Bearer sk-secret"}):
        assert post(closed, MESSAGES, body(), headers=headers).status_code == 200


def test_a_stream_that_fails_ends_with_an_error_event(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    scheduler.script.pause_at = 2
    headers = {"X-Request-Timeout": "0.5"}
    found = events(post(gateway, MESSAGES, body(stream=True), headers=headers))
    assert found[-1]["type"] == "error"
    assert found[-1]["error"]["type"] == "timeout_error"
    assert all(event["type"] != "message_stop" for event in found)
    scheduler.wait_for(Cancel)
