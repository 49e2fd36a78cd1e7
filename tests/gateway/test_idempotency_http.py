"""Requests with an idempotency key, sent again to one gateway and to several."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess
from http_client import begin, error, events, post, wait_until

from sfllm.messages import Cancel, Submit

COMPLETIONS = "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "say:hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "say:hello|"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "say:hello|"}], "max_tokens": 9},
    "/v1/responses": {"input": "say:hello|"},
    "/generate": {"text": "say:hello"},
}
NAMES: dict[str, Callable[[Any], str]] = {
    "/generate": lambda answer: str(answer["meta_info"]["id"]),
}


@pytest.fixture(scope="module")
def second_gateway(scheduler: FakeScheduler) -> Iterator[GatewayProcess]:
    process = GatewayProcess(scheduler)
    process.wait_ready()
    yield process
    code, log = process.stop()
    assert code == 0, log
    assert "Traceback" not in log, log


def key(value: str) -> dict[str, str]:
    return {"Idempotency-Key": value}


def seeds(scheduler: FakeScheduler) -> list[int]:
    return [submit.sampling.seed for submit in scheduler.of(Submit) if isinstance(submit, Submit)]


def name(path: str, answer: requests.Response) -> str:
    assert answer.status_code == 200, answer.text
    return NAMES.get(path, lambda found: str(found["id"]))(answer.json())


@pytest.mark.parametrize("path", BODIES)
def test_a_retry_on_the_same_gateway_gets_the_same_answer_without_any_work(
    gateway: GatewayProcess, scheduler: FakeScheduler, path: str
) -> None:
    replays = gateway.metric("idempotent_replays_total")
    body = {**BODIES[path], "colour": 1}
    first = post(gateway, path, body, headers=key(f"same {path}"))
    assert "Idempotent-Replayed" not in first.headers
    again = post(gateway, path, body, headers={**key(f"same {path}"), "X-Request-Id": "another"})
    assert again.content == first.content
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["X-Request-Id"] == "another"
    assert again.headers["X-Sfllm-Ignored-Fields"] == first.headers["X-Sfllm-Ignored-Fields"] == "colour"
    assert len(scheduler.of(Submit)) == 1
    assert gateway.metric("idempotent_replays_total") == replays + 1


@pytest.mark.parametrize("path", BODIES)
def test_a_retry_on_another_gateway_has_the_same_seed_and_name(
    gateway: GatewayProcess, second_gateway: GatewayProcess, scheduler: FakeScheduler, path: str
) -> None:
    first = post(gateway, path, BODIES[path], headers=key(f"other {path}"))
    again = post(second_gateway, path, BODIES[path], headers=key(f"other {path}"))
    assert "Idempotent-Replayed" not in again.headers
    assert name(path, first) == name(path, again)
    first_seed, second_seed = seeds(scheduler)
    assert first_seed == second_seed


def test_a_seed_of_the_clients_own_is_kept(gateway: GatewayProcess, scheduler: FakeScheduler) -> None:
    post(gateway, COMPLETIONS, {"prompt": "say:x", "seed": 3}, headers=key("seeded"))
    assert seeds(scheduler) == [3]


def test_prompts_of_one_request_have_seeds_of_their_own(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    post(gateway, COMPLETIONS, {"prompt": ["say:x", "say:x"]}, headers=key("several"))
    first, second = seeds(scheduler)
    assert first != second


def test_a_stream_is_served_anew_with_the_same_seed_and_name(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    body = {"prompt": "say:hello", "stream": True}
    first, again = (events(post(gateway, COMPLETIONS, body, headers=key("stream"))) for _ in range(2))
    assert first[0]["id"] == again[0]["id"]
    assert len(set(seeds(scheduler))) == 1
    assert len(scheduler.of(Submit)) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_key_names_one_body_and_one_path(gateway: GatewayProcess, streaming: bool) -> None:
    body = {"prompt": "say:x", "stream": streaming}
    used = key(f"reused {streaming}")
    assert post(gateway, COMPLETIONS, body, headers=used).status_code == 200
    other = error(post(gateway, COMPLETIONS, {**body, "max_tokens": 3}, headers=used), 400)
    assert (other["code"], other["param"]) == ("idempotency_key_reused", "Idempotency-Key")
    chat = BODIES["/v1/chat/completions"]
    assert error(post(gateway, "/v1/chat/completions", chat, headers=used), 400)["code"] == other["code"]


def test_a_request_that_was_refused_may_be_mended(gateway: GatewayProcess) -> None:
    error(post(gateway, COMPLETIONS, {"prompt": "x" * 600}, headers=key("mended")), 400)
    assert post(gateway, COMPLETIONS, {"prompt": "say:x"}, headers=key("mended")).status_code == 200


@pytest.mark.parametrize("value", ["x" * 256, "a\tb", "é"])
def test_a_key_that_is_none_is_refused(gateway: GatewayProcess, value: str) -> None:
    headers = {"Idempotency-Key": value.encode("latin-1")}
    answer = requests.post(gateway.url + COMPLETIONS, json={"prompt": "x"}, headers=headers, timeout=20)
    assert error(answer, 400)["param"] == "Idempotency-Key"


def test_retries_that_come_meanwhile_wait_for_the_first(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    scheduler.script.pause_at = 2
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(post, gateway, COMPLETIONS, {"prompt": "say:long"}, headers=key("meanwhile"))
            for _ in range(4)
        ]
        wait_until(lambda: gateway.metric("gateway_open_requests") == 4, "all four are there")
        scheduler.resume()
        answers = [future.result() for future in asked]
    assert len({answer.content for answer in answers}) == 1
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 3
    assert len(scheduler.of(Submit)) == 1


def test_a_retry_waits_no_longer_than_its_own_deadline(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    scheduler.script.pause_at = 2
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, gateway, COMPLETIONS, {"prompt": "say:long"}, headers=key("deadline"))
        scheduler.wait_for(Submit)
        headers = {**key("deadline"), "X-Request-Timeout": "0.2"}
        late = post(gateway, COMPLETIONS, {"prompt": "say:long"}, headers=headers)
        assert error(late, 504)["code"] == "deadline_exceeded"
        scheduler.resume()
        assert first.result().status_code == 200


def test_where_the_first_client_leaves_the_retry_is_served(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    scheduler.script.pause_at = 2
    body = {"prompt": "say:long"}
    client = begin(gateway, COMPLETIONS, body, Idempotency_Key="left")
    scheduler.wait_for(Submit)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        data = {"data": b'{"prompt": "say:long"}', "headers": key("left")}
        retry = pool.submit(post, gateway, COMPLETIONS, **data)
        wait_until(lambda: gateway.metric("gateway_open_requests") == 2, "both are there")
        client.close()
        scheduler.wait_for(Cancel)
        scheduler.resume()
        answer = retry.result()
    assert answer.json()["choices"][0]["text"] == "long"
    assert "Idempotent-Replayed" not in answer.headers
    first_seed, second_seed = seeds(scheduler)
    assert first_seed == second_seed


def test_tenants_may_use_the_same_key(scheduler: FakeScheduler, start: Callable[..., GatewayProcess]) -> None:
    closed = start(scheduler, "--api-key=sk-a,sk-b", "--max-idempotency-bytes=0")
    closed.wait_ready()
    scheduler.seen.clear()
    names = set()
    for secret in ("sk-a", "sk-b", "sk-a"):
        headers = {**key("shared"), "Authorization": f"Bearer {secret}"}
        answer = post(closed, COMPLETIONS, {"prompt": "say:x"}, headers=headers)
        names.add(name(COMPLETIONS, answer))
        assert "Idempotent-Replayed" not in answer.headers  # there is no room for answers
    assert len(names) == 2
    first, second, third = seeds(scheduler)
    assert first == third != second
