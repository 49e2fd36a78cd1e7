"""`/v1/responses` over HTTP: the response, its stream, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
import requests
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess
from http_client import error, post

from sfllm.errors import ErrorCode
from sfllm.messages import Cancel, Rejected, Submit

RESPONSES = "/v1/responses"


def events(answer: requests.Response) -> list[dict[str, Any]]:
    """The events of a stream, numbered in order, each of which names its type twice."""
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
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def ask(gateway: GatewayProcess, says: str = "hello", **fields: Any) -> requests.Response:
    return post(gateway, RESPONSES, {"input": f"say:{says}|", **fields})


@pytest.fixture
def client(gateway: GatewayProcess) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{gateway.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=20,
        _strict_response_validation=True,
    )


def test_a_response_has_the_documented_form(gateway: GatewayProcess, scheduler: FakeScheduler) -> None:
    scheduler.script.cached_tokens = 9
    answer = ask(gateway, instructions="brief", metadata={"job": "7"}, user="u", request_id="one")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body.pop("completed_at") >= body.pop("created_at") > 1.7e9
    prompt = len(scheduler.prompts[0])
    assert body == {
        "id": "resp_one",
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "frequency_penalty": 0.0,
        "incomplete_details": None,
        "instructions": "brief",
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {"job": "7"},
        "model": "tiny",
        "output": [
            {
                "id": "msg_one_0",
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}],
            }
        ],
        "parallel_tool_calls": True,
        "presence_penalty": 0.0,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 9, "cache_write_tokens": 0},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + 5,
        },
        "user": "u",
    }


def test_a_stream_tells_of_the_same_response_in_the_documented_order(gateway: GatewayProcess) -> None:
    plain = ask(gateway, request_id="one").json()
    found = events(ask(gateway, request_id="one", stream=True))
    kinds = [event["type"].removeprefix("response.") for event in found]
    deltas = [event["delta"] for event in found if event["type"] == "response.output_text.delta"]
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * len(deltas),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert "".join(deltas) == "hello"
    assert found[0]["response"]["status"] == found[1]["response"]["status"] == "in_progress"
    assert found[0]["response"]["output"] == []
    last = found[-1]["response"]
    times = {"created_at", "completed_at"}
    assert {k: v for k, v in last.items() if k not in times} == {
        k: v for k, v in plain.items() if k not in times
    }


@pytest.mark.parametrize("stream", [False, True])
def test_an_output_that_was_cut_off_is_incomplete(gateway: GatewayProcess, stream: bool) -> None:
    answer = post(gateway, RESPONSES, {"input": "x", "max_output_tokens": 3, "stream": stream})
    last = events(answer)[-1] if stream else {"type": "response.incomplete", "response": answer.json()}
    assert last["type"] == "response.incomplete"
    found = last["response"]
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert found["output"][0]["status"] == "incomplete"
    assert found["output"][0]["content"][0]["text"] == "abc"
    assert found["completed_at"] is None


def test_a_stream_that_fails_ends_with_the_failed_response(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    scheduler.script.suspects = 3
    scheduler.script.interrupt_at = [2, 3, 4, 5]
    found = events(post(gateway, RESPONSES, {"input": "x", "max_output_tokens": 8, "stream": True}))
    last = found[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert last["response"]["error"]["type"] == "server_error"
    assert last["response"]["error"]["message"]


def test_the_worker_is_told_how_to_sample(gateway: GatewayProcess, scheduler: FakeScheduler) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 5,
        "seed": 7,
        "max_output_tokens": 3,
        "priority": -1,
    }
    body = ask(gateway, **fields, cache_salt="s", top_logprobs=2).json()
    (submit,) = scheduler.wait_for(Submit)
    assert isinstance(submit, Submit)
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 5)
    assert (sampling.seed, sampling.max_tokens, sampling.logprobs) == (7, 3, 2)
    assert (submit.priority, submit.cache_salt) == (-1, "s")
    assert (body["temperature"], body["top_p"], body["max_output_tokens"]) == (0.5, 0.25, 3)


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"text": {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}}},
        {"text": {"format": {"type": "json_object"}}},
        {"structured_outputs": {"choice": ["hello", "bye"]}},
    ],
)
def test_the_worker_is_told_the_form_of_the_text(
    gateway: GatewayProcess, scheduler: FakeScheduler, fields: dict[str, Any]
) -> None:
    body = ask(gateway, **fields).json()
    (submit,) = scheduler.wait_for(Submit)
    assert isinstance(submit, Submit)
    assert submit.sampling.grammar
    assert body["text"]["format"] == fields.get("text", {"format": {"type": "text"}})["format"]


def test_a_client_that_leaves_cancels_the_request(gateway: GatewayProcess, scheduler: FakeScheduler) -> None:
    scheduler.script.pause_at = 2
    body = {"input": "x", "stream": True, "max_output_tokens": 26}
    with requests.post(gateway.url + RESPONSES, json=body, stream=True, timeout=20) as answer:
        assert answer.status_code == 200
    scheduler.wait_for(Cancel)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": None}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": "x" * 600}, 400, "input"),
        ({"input": [{"role": "user", "content": "x" * 600}]}, 400, "input"),
        ({"temperature": 3}, 400, "temperature"),
        ({"stop": [""]}, 400, "stop"),
        ({"model": "none"}, 404, "model"),
        ({"store": True}, 501, "store"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "robot"}}}},
            400,
            "text.format.schema",
        ),
        ({"structured_outputs": {"regex": "("}}, 400, "structured_outputs.regex"),
        ({"tools": [{"type": "web_search"}]}, 501, "tools[0].type"),
    ],
)
def test_refusals_name_the_field_at_fault(
    gateway: GatewayProcess, fields: dict[str, Any], status: int, param: str
) -> None:
    assert error(post(gateway, RESPONSES, {"input": "x", **fields}), status)["param"] == param


def test_a_busy_server_says_so_before_a_stream_begins(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    scheduler.script.reject = Rejected(0, 0, ErrorCode.QUEUE_FULL.value, "full", 3)
    answer = ask(gateway, stream=True)
    assert error(answer, 429)["code"] == "queue_full"
    assert answer.headers["retry-after"] == "3"


def test_what_had_no_effect_is_named_in_a_header(gateway: GatewayProcess) -> None:
    answer = ask(gateway, zz=1, text={"colour": "red"}, service_tier="auto")
    assert answer.headers["x-sfllm-ignored-fields"] == "text.colour, zz"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "resp_1"), ("DELETE", "resp_1"), ("POST", "resp_1/cancel"), ("GET", "resp_1/input_items")],
)
def test_nothing_is_kept_to_ask_for(gateway: GatewayProcess, method: str, path: str) -> None:
    answer = requests.request(method, f"{gateway.url}{RESPONSES}/{path}", timeout=10)
    assert "keeps no responses" in error(answer, 501)["message"]


def test_the_client_reads_a_response(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="say:schön €|", store=False)
    assert answer.output_text == "schön €"
    assert answer.status == "completed"


def test_the_client_puts_a_stream_together(client: openai.OpenAI) -> None:
    with client.responses.stream(model="tiny", input="say:schön €|") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "schön €"


def test_the_client_reads_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="tiny", input="say:hi|", include=["message.output_text.logprobs"], top_logprobs=2
    )
    item = answer.output[0]
    assert item.type == "message"
    part = item.content[0]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert [token.token for token in part.logprobs] == ["h", "i"]
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)


def test_the_client_is_told_that_nothing_is_kept(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="keeps no responses"):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.InternalServerError, match="keeps no responses"):
        client.responses.create(model="tiny", input="x", previous_response_id="resp_1")
