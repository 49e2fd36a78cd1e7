"""Lost workers, restarted schedulers, clients that leave, and the way out: against real processes."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from fake_scheduler import FakeScheduler, model_card
from gateway_process import GatewayProcess
from http_client import (
    complete,
    error,
    events,
    finish_reasons,
    open_stream,
    post,
    read_all,
    rest,
    stream,
    text_of,
    wait_until,
)

from sfllm.messages import Cancel, ModelState, Resend, Submit

COMPLETIONS = "/v1/completions"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("tokens_per_message", [1, 3])
def test_a_stream_goes_on_where_a_lost_worker_left_it(
    gateway: GatewayProcess, scheduler: FakeScheduler, tokens_per_message: int
) -> None:
    scheduler.script.tokens_per_message = tokens_per_message
    scheduler.script.interrupt_at = [3, 9, 15]
    chunks = stream(gateway, COMPLETIONS, prompt="x", max_tokens=26, n=2)
    assert [text_of(chunks, index) for index in (0, 1)] == [ALPHABET, ALPHABET]
    attempts = [message for message in scheduler.seen if isinstance(message, Submit)]
    assert [message.attempt for message in attempts] == [0, 1, 2, 3]
    assert attempts[1].generated_counts == (3, 3)
    assert attempts[1].last_worker == "w-1"


def test_a_request_that_keeps_crashing_workers_fails_with_500(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    scheduler.script.suspects = 3
    scheduler.script.interrupt_at = [1, 2, 3, 4]
    found = error(post(gateway, COMPLETIONS, {"prompt": "x"}), 500)
    assert (found["type"], found["code"]) == ("server_error", "engine_failure")
    scheduler.script.pause_at = 1
    _, lines = open_stream(gateway)
    first = next(lines)
    scheduler.script.interrupt_at = [2, 3, 4, 5]
    scheduler.resume()
    *chunks, last = rest(itertools.chain([first], lines))
    assert text_of(chunks) == "abcde"
    assert last["error"]["code"] == "engine_failure"  # type: ignore[index]  # JSON of an error


def test_repeated_tokens_are_delivered_once(gateway: GatewayProcess, scheduler: FakeScheduler) -> None:
    scheduler.script.repeat_tokens = True
    assert complete(gateway, prompt="x", max_tokens=26)["choices"][0]["text"] == ALPHABET


def test_missing_tokens_are_asked_for_again(gateway: GatewayProcess, scheduler: FakeScheduler) -> None:
    scheduler.script.skip_at = [4]
    scheduler.script.pause_at = 20  # or its end might come before the gap is noticed
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, gateway, prompt="x", max_tokens=26)
        scheduler.wait_for(Resend)
        scheduler.resume()
        assert answer.result()["choices"][0]["text"] == ALPHABET
    assert [message.attempt for message in scheduler.of(Submit) if isinstance(message, Submit)] == [0]


@pytest.mark.parametrize("fields", [{}, {"logprobs": 1}])
def test_missing_tokens_that_nobody_has_any_more_are_made_again(
    gateway: GatewayProcess, scheduler: FakeScheduler, fields: dict[str, int]
) -> None:
    scheduler.script.skip_at = [4] if fields else [25]
    answer = complete(gateway, prompt="x", max_tokens=26, **fields)
    assert answer["choices"][0]["text"] == ALPHABET
    assert {cancel.reason for cancel in scheduler.of(Cancel) if isinstance(cancel, Cancel)} == {"gap"}
    assert not scheduler.of(Resend)


def test_a_submit_that_nobody_acknowledges_is_sent_again(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    scheduler.script.ignore_submits = 1
    assert complete(gateway, prompt="say:hi")["choices"][0]["text"] == "hi"
    assert [message.attempt for message in scheduler.of(Submit) if isinstance(message, Submit)] == [0, 0]


def test_a_scheduler_that_forgot_the_gateway_gets_its_requests_again(
    gateway: GatewayProcess, scheduler: FakeScheduler
) -> None:
    scheduler.script.pause_at = 5
    _, lines = open_stream(gateway)
    scheduler.wait_for(Submit)
    wait_until(lambda: gateway.metric("generation_tokens_total") > 0, "no token came")
    scheduler.forget_gateways()
    scheduler.wait_for(Submit, 2)
    scheduler.resume()
    chunks = rest(lines)
    assert text_of(chunks) == ALPHABET
    assert finish_reasons(chunks) == ["length"]


def test_streams_survive_a_restarted_scheduler(start: Callable[..., GatewayProcess]) -> None:
    first = FakeScheduler()
    gateway = start(first)
    gateway.wait_ready()
    first.script.pause_at = 7
    _, lines = open_stream(gateway)
    wait_until(lambda: gateway.metric("generation_tokens_total") == 7, "no seven tokens")
    first.close()
    second = FakeScheduler(first.gateway_address, first.asset_address)
    try:
        assert text_of(rest(lines)) == ALPHABET
        submit = second.of(Submit)[0]
        assert isinstance(submit, Submit)
        assert (submit.attempt >= 1, submit.generated_counts) == (True, (7,))
        assert complete(gateway, prompt="say:new")["choices"][0]["text"] == "new"
    finally:
        second.close()


def test_without_a_scheduler_new_requests_are_503_and_open_ones_wait(
    start: Callable[..., GatewayProcess],
) -> None:
    first = FakeScheduler()
    gateway = start(first)
    gateway.wait_ready()
    first.script.pause_at = 2
    _, lines = open_stream(gateway)
    wait_until(lambda: gateway.metric("generation_tokens_total") == 2, "no two tokens")
    first.close()
    assert error(gateway.wait_ready(503), 503)["message"] == "the scheduler cannot be reached"
    answer = post(gateway, COMPLETIONS, {"prompt": "x"})
    assert error(answer, 503)["type"] == "service_unavailable_error"
    assert answer.headers["Retry-After"] == "1"
    assert requests.get(f"{gateway.url}/health", timeout=5).status_code == 200
    second = FakeScheduler(first.gateway_address, first.asset_address)
    try:
        assert text_of(rest(lines)) == ALPHABET
        gateway.wait_ready()
    finally:
        second.close()


def test_a_new_request_waits_for_a_scheduler_that_is_being_restarted(
    start: Callable[..., GatewayProcess],
) -> None:
    first = FakeScheduler()
    gateway = start(first, "--connect-wait-seconds=60")
    gateway.wait_ready()
    first.close()
    gateway.wait_ready(503)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, gateway, prompt="say:patience")
        gateway.wait_until(lambda: gateway.metric("gateway_open_requests") == 1)
        second = FakeScheduler(first.gateway_address, first.asset_address)
        try:
            assert answer.result(30)["choices"][0]["text"] == "patience"
        finally:
            second.close()


def test_a_model_that_was_served_is_waited_for_and_one_that_never_was_is_404(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    gateway = start(own_scheduler, "--connect-wait-seconds=60")
    gateway.wait_ready()
    own_scheduler.set_models(ModelState(model_card("other", ()), 1))
    models = f"{gateway.url}/v1/models"
    gateway.wait_until(lambda: requests.get(models, timeout=5).json()["data"][0]["id"] == "other")
    assert error(post(gateway, COMPLETIONS, {"prompt": "x", "model": "no such"}), 404)["param"] == "model"
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, gateway, prompt="say:back", model="tiny")
        gateway.wait_until(lambda: gateway.metric("gateway_open_requests") == 1)
        own_scheduler.set_models(ModelState(model_card("other", ()), 1), ModelState(model_card(), 1))
        assert answer.result(30)["choices"][0]["text"] == "back"


def test_before_any_model_is_known_requests_are_503(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    own_scheduler.models = ()
    gateway = start(own_scheduler)
    wait_until(lambda: error(gateway.wait_ready(503), 503)["message"] == "no model is known", "no welcome")
    answer = post(gateway, COMPLETIONS, {"prompt": "x"})
    assert error(answer, 503)["message"] == "no model is being served yet"
    assert answer.headers["Retry-After"] == "1"
    assert requests.get(f"{gateway.url}/v1/models", timeout=5).json()["data"] == []
    own_scheduler.set_models(ModelState(model_card(), 0))
    wait_until(lambda: error(gateway.wait_ready(503), 503)["message"] == "no worker is there", "no model")
    own_scheduler.set_models(ModelState(model_card(), 1), ModelState(model_card("other", ()), 1))
    gateway.wait_ready()
    assert error(post(gateway, COMPLETIONS, {"prompt": "x"}), 400)["param"] == "model"
    assert complete(gateway, model="other", prompt="say:x")["model"] == "other"


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_cancels_everywhere(
    gateway: GatewayProcess, scheduler: FakeScheduler, streaming: bool, n: int
) -> None:
    scheduler.script.pause_at = 4
    before = gateway.metric("disconnected_clients_total")
    body = {"prompt": "x", "stream": streaming, "n": n, "max_tokens": 400}
    if streaming:
        answer, lines = open_stream(gateway, n=n)
        next(lines)
        answer.close()
    else:
        with pytest.raises(requests.ReadTimeout):
            requests.post(gateway.url + COMPLETIONS, json=body, timeout=0.3)
    cancel = scheduler.wait_for(Cancel)[0]
    assert isinstance(cancel, Cancel)
    assert cancel.choice == -1
    wait_until(lambda: not scheduler.running, "it still runs")
    wait_until(lambda: gateway.metric("disconnected_clients_total") == before + 1, "not counted")
    wait_until(lambda: gateway.metric("gateway_open_requests") == 0, "still open")


@pytest.mark.parametrize("path", [COMPLETIONS, "/tokenize"])
def test_a_client_that_leaves_within_its_body_is_no_failure(gateway: GatewayProcess, path: str) -> None:
    before = gateway.metric("disconnected_clients_total")
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode() + b"{")
    wait_until(lambda: gateway.metric("disconnected_clients_total") == before + 1, "not counted")
    assert "unexpected failure" not in gateway.log()


def test_a_deadline_ends_a_request_that_nobody_finishes(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    gateway = start(own_scheduler, "--request-timeout-seconds=0.5", "--keep-alive-seconds=0.2")
    gateway.wait_ready()
    own_scheduler.script.pause_at = 2
    answer = post(gateway, COMPLETIONS, {"prompt": "x", "stream": True})
    assert events(answer)[-1]["error"]["code"] == "deadline_exceeded"
    assert b": keep-alive\n\n" in answer.content
    assert error(post(gateway, COMPLETIONS, {"prompt": "x"}), 504)["type"] == "timeout_error"
    own_scheduler.wait_for(Cancel, 2)


def test_forty_requests_at_once_each_get_their_own_text(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    gateway = start(own_scheduler)
    gateway.wait_ready()

    def ask(number: int) -> str:
        if number % 2:
            return text_of(stream(gateway, COMPLETIONS, prompt=f"say:text {number}"))
        return str(complete(gateway, prompt=f"say:text {number}")["choices"][0]["text"])

    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(ask, range(40))) == [f"text {number}" for number in range(40)]
    wait_until(lambda: gateway.metric("gateway_open_requests") == 0, "still open")


def test_a_client_that_reads_nothing_is_cut_off_at_the_deadline(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    gateway = start(own_scheduler, "--request-timeout-seconds=1")
    gateway.wait_ready()
    # Native events carry all text so far: 128 choices of them are more than any buffer on the way takes.
    params = {"n": 128, "max_new_tokens": 500}
    body = json.dumps({"text": "x", "sampling_params": params, "stream": True}).encode()
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", gateway.port))
        client.sendall(head + body)
        own_scheduler.wait_for(Submit)
        wait_until(lambda: gateway.metric("disconnected_clients_total") == 1, "still open")
        assert gateway.metric("gateway_open_requests") == 0
        client.settimeout(10)
        assert b"[DONE]" not in read_all(client)
