"""The table of errors, row by row: what happens, and the status, type, code and param of the answer."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import requests
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess
from http_client import error

from sfllm.messages import Rejected

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
X = {"prompt": "x"}
MESSAGES = [{"role": "user", "content": "x"}]
JSON = {"Content-Type": "application/json"}
TEXT = {"Content-Type": "text/plain"}


class Row(NamedTuple):
    """A request (`data` as it is, else `body` as JSON), or what the scheduler says to a good one."""

    status: int
    type: str
    code: str
    param: str | None = None
    path: str = COMPLETIONS
    body: Any = None
    data: bytes | None = None
    headers: dict[str, str] = JSON
    method: str = "POST"
    rejected: str | None = None


def bad(param: str | None = None, **fields: Any) -> Row:
    return Row(400, "invalid_request_error", "invalid_request", param, **fields)


def rejected(status: int, kind: str, code: str) -> Row:
    return Row(status, kind, code, body=X, rejected=code)


ROWS: dict[str, Row] = {
    "bad JSON": bad(data=b'{"prompt": '),
    "not an object": bad(body=["x"]),
    "no body": bad(data=b""),
    "a wrong JSON type": bad("max_tokens", body={**X, "max_tokens": "5"}),
    "a wrong content type": bad(data=b'{"prompt": "x"}', headers=TEXT),
    "a missing field": bad("prompt", body={}),
    "a missing field inside": bad("messages[0].role", path=CHAT, body={"messages": [{"content": "x"}]}),
    "a value out of bounds": bad("temperature", body={**X, "temperature": 3}),
    "contradictory fields": bad(
        "continue_final_message",
        path=CHAT,
        body={"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
    ),
    "fields that need another": bad(
        "top_logprobs", path=CHAT, body={"messages": MESSAGES, "top_logprobs": 1}
    ),
    "a token id that does not exist": bad("logit_bias", body={**X, "logit_bias": {"999": 1}}),
    "nothing to tokenize": bad("prompt", path="/tokenize", body={}),
    "a prompt longer than the context": Row(
        400, "invalid_request_error", "context_length_exceeded", "prompt", body={"prompt": "x" * 512}
    ),
    "a conversation longer than the context": Row(
        *(400, "invalid_request_error", "context_length_exceeded", "messages"),
        path=CHAT,
        body={"messages": [{"role": "user", "content": "x" * 512}]},
    ),
    "an unknown model": Row(404, "not_found_error", "model_not_found", "model", body={**X, "model": "y"}),
    "an unknown model's card": Row(
        404, "not_found_error", "model_not_found", "model", method="GET", path="/v1/models/y"
    ),
    "an unknown model's tokenizer": Row(
        404, "not_found_error", "model_not_found", "model", method="GET", path="/tokenizer_info?model=y"
    ),
    "an unknown path": Row(404, "not_found_error", "not_found", method="GET", path="/v2/completions"),
    "a wrong method": Row(405, "invalid_request_error", "method_not_allowed", method="GET"),
    "a body larger than the limit": Row(
        413, "invalid_request_error", "body_too_large", body={"prompt": "x" * 70_000}
    ),
    "a large body to tokenize": Row(
        413, "invalid_request_error", "body_too_large", path="/tokenize", body={"prompt": "x" * 70_000}
    ),
    "the queue is full": rejected(429, "overloaded_error", "queue_full"),
    "no worker": rejected(503, "service_unavailable_error", "service_unavailable"),
    "the deadline passed": rejected(504, "timeout_error", "deadline_exceeded"),
    "the engine failed": rejected(500, "server_error", "engine_failure"),
    "an unsupported field": Row(
        501, "not_implemented_error", "not_supported", "best_of", body={**X, "best_of": 2}
    ),
    "an unsupported part": Row(
        *(501, "not_implemented_error", "not_supported", "messages[0].content[0].type"),
        path=CHAT,
        body={"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    ),
    "a call of a tool that is not there": Row(
        *(400, "invalid_request_error", "invalid_request", "tool_choice"),
        path=CHAT,
        body={"messages": MESSAGES, "tool_choice": "required"},
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_an_error_has_its_status_type_code_and_param(
    gateway: GatewayProcess, scheduler: FakeScheduler, case: str
) -> None:
    row = ROWS[case]
    if row.rejected is not None:
        scheduler.script.reject = Rejected(0, 0, row.rejected, "not now", 2.5)
    body = {"json": row.body} if row.data is None else {"data": row.data, "headers": row.headers}
    answer = requests.request(row.method, gateway.url + row.path, timeout=20, **body)
    found = error(answer, row.status)
    assert (found["type"], found["code"], found["param"]) == (row.type, row.code, row.param)
    assert 0 < len(found["message"]) <= 600
    if row.status in {429, 503}:
        assert answer.headers["Retry-After"] == "3"


def test_a_long_value_is_cut_where_it_is_quoted(gateway: GatewayProcess) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "x" * 10_000}]}]}
    answer = requests.post(gateway.url + CHAT, json=body, timeout=20)
    assert len(error(answer, 501)["message"]) < 400
