"""Health, readiness, models, metrics and the API document of a real gateway process."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import requests
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess, free_port
from http_client import complete, error, post
from prometheus_client.parser import text_string_to_metric_families

from sfllm_gateway.openai.chat import ChatRequest


def get(gateway: GatewayProcess, path: str) -> requests.Response:
    return requests.get(gateway.url + path, timeout=5)


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_health_says_healthy_and_when(gateway: GatewayProcess, path: str) -> None:
    body = get(gateway, path).json()
    assert body["status"] == "healthy"
    assert abs(body["timestamp"] - time.time()) < 5
    assert isinstance(body["timestamp"], int)


def test_ready_and_version(gateway: GatewayProcess) -> None:
    assert get(gateway, "/ready").json() == {"status": "ready"}
    assert set(get(gateway, "/version").json()) == {"version", "protocol"}


def test_a_model_is_listed_under_all_its_names(gateway: GatewayProcess) -> None:
    body = get(gateway, "/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["tiny", "tiny-alias"]
    assert get(gateway, "/v1/models/tiny").json() == {
        "id": "tiny",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "sfllm",
        "root": "tiny-root",
        "parent": None,
        "max_model_len": 512,
        "permission": [],
    }
    assert error(get(gateway, "/v1/models/org/none"), 404)["param"] == "model"


def samples(gateway: GatewayProcess) -> dict[str, float]:
    """Every sample of `/metrics` of the model, by name and reason."""
    found = {}
    for family in text_string_to_metric_families(get(gateway, "/metrics").text):
        for sample in family.samples:
            if sample.labels.get("model_name") == "tiny" and "le" not in sample.labels:
                name = sample.name.removeprefix("sfllm:") + sample.labels.get("finished_reason", "")
                found[name] = sample.value
    return found


def test_a_request_shows_in_the_metrics(gateway: GatewayProcess) -> None:
    complete(gateway, prompt="x", max_tokens=5)
    before = samples(gateway)
    complete(gateway, prompt="say:abc", n=2)
    complete(gateway, prompt="xy", max_tokens=5)
    after = samples(gateway)
    grown = {name: round(value - before.get(name, 0), 6) for name, value in after.items()}
    expected = {
        "prompt_tokens_total": 9,
        "generation_tokens_total": 11,
        "request_success_totalstop": 2,
        "request_success_totallength": 1,
        "time_to_first_token_seconds_count": 2,
        "e2e_request_latency_seconds_count": 2,
        "request_prompt_tokens_sum": 9,
        "request_generation_tokens_sum": 11,
        "request_params_n_sum": 3,
        "request_time_per_output_token_seconds_count": 2,
        "request_queue_time_seconds_sum": 0.2,
        "request_prefill_time_seconds_sum": 0.4,
        "request_decode_time_seconds_sum": 0.6,
        "request_inference_time_seconds_sum": 1.0,
    }
    assert {name: grown[name] for name in expected} == expected
    gateway.wait_until(lambda: gateway.metric("event_loop_delay_seconds_count") > 0)


def test_http_requests_are_counted_by_route_and_never_by_path(gateway: GatewayProcess) -> None:
    get(gateway, "/v1/models/one")
    get(gateway, "/some/random/path")
    post(gateway, "/v1/completions", {"prompt": 3})
    text = get(gateway, "/metrics").text
    counter = "sfllm:http_requests_total"
    assert counter + '{handler="/v1/models/{model_id:path}",method="GET",status="404"}' in text
    assert counter + '{handler="unmatched",method="GET",status="404"}' in text
    assert counter + '{handler="/v1/completions",method="POST",status="400"}' in text
    assert "random" not in text


def test_the_document_describes_bodies_and_every_status(gateway: GatewayProcess) -> None:
    document = get(gateway, "/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/ChatRequest"
    }
    assert set(chat["responses"]) == {"200", "400", "401", "404", "413", "429", "500", "501", "503", "504"}
    schemas = document["components"]["schemas"]
    assert set(schemas["ChatRequest"]["properties"]) == set(ChatRequest.__struct_fields__)
    assert schemas["ChatRequest"]["required"] == ["messages"]
    assert "<title>sfllm" in get(gateway, "/docs").text


def test_the_examples_of_the_document_are_answered_and_no_status_is_made_up(gateway: GatewayProcess) -> None:
    document = get(gateway, "/openapi.json").json()
    for path, methods in document["paths"].items():
        assert all("422" not in operation["responses"] for operation in methods.values()), path
        if body := methods.get("post", {}).get("requestBody"):
            example = body["content"]["application/json"]["example"]
            answer = requests.post(gateway.url + path, json=example, timeout=20)
            # The model of these tests makes no embeddings.
            assert answer.status_code == (501 if path == "/v1/embeddings" else 200), answer.text


@pytest.fixture
def monitored(scheduler: FakeScheduler) -> Iterator[tuple[GatewayProcess, int]]:
    port = free_port()
    process = GatewayProcess(scheduler, f"--admin-port={port}", "--metrics-prefix=vllm:")
    process.wait_ready()
    yield process, port
    assert process.stop()[0] == 0


def test_the_admin_port_serves_the_same_metrics(monitored: tuple[GatewayProcess, int]) -> None:
    _, port = monitored
    assert "vllm:http_requests_total" in requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
    assert requests.get(f"http://127.0.0.1:{port}/health", timeout=5).json()["status"] == "healthy"
