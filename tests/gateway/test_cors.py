"""What web pages of other origins may do: nothing, unless their origin is set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
from fake_scheduler import FakeScheduler, Script
from gateway_process import GatewayProcess
from http_client import error, post

from sfllm.api_keys import key_line
from sfllm.messages import Rejected

ORIGIN = "https://chat.example.com"
KEY = "sk-of-a-page"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
}
FROM_PAGE = {"Origin": ORIGIN, "Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def shared_page_gateway(
    scheduler: FakeScheduler, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(key_line("page", KEY))
    process = GatewayProcess(
        scheduler, f"--cors-origins={ORIGIN},http://localhost:3000", f"--api-key-file={file}"
    )
    process.wait_ready()
    yield process
    code, log = process.stop()
    assert code == 0, log


@pytest.fixture
def page_gateway(shared_page_gateway: GatewayProcess, scheduler: FakeScheduler) -> GatewayProcess:
    """A gateway that knows an origin and a key, with the scheduler's script as it is at first."""
    scheduler.script = Script()
    return shared_page_gateway


def preflight(gateway: GatewayProcess, **headers: str) -> requests.Response:
    return requests.options(
        f"{gateway.url}/v1/chat/completions", headers={**PREFLIGHT, **headers}, timeout=20
    )


def test_a_preflight_is_answered_without_a_key(page_gateway: GatewayProcess) -> None:
    answer = preflight(page_gateway)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    allowed = answer.headers["Access-Control-Allow-Headers"].lower()
    assert all(name in allowed for name in ("authorization", "content-type", "x-stainless-lang"))


def test_a_preflight_of_another_origin_is_refused(page_gateway: GatewayProcess) -> None:
    answer = preflight(page_gateway, Origin="https://evil.example.com")
    assert answer.status_code == 400
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("stream", [False, True])
def test_a_page_may_read_answers_and_the_heads_it_needs(page_gateway: GatewayProcess, stream: bool) -> None:
    body = {"prompt": "say:hi", "stream": stream, "unheard_of": 1}
    answer = post(page_gateway, "/v1/completions", body, headers=FROM_PAGE)
    assert answer.status_code == 200
    assert "hi" in answer.text
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "origin" in answer.headers["Vary"].lower()
    exposed = answer.headers["Access-Control-Expose-Headers"].lower()
    assert all(name in exposed for name in ("x-request-id", "retry-after", "x-sfllm-ignored-fields"))


def test_a_page_may_read_why_it_is_refused(page_gateway: GatewayProcess, scheduler: FakeScheduler) -> None:
    refused = post(page_gateway, "/v1/completions", {"prompt": "x"}, headers={"Origin": ORIGIN})
    error(refused, 401)
    assert refused.headers["Access-Control-Allow-Origin"] == ORIGIN
    scheduler.script.reject = Rejected(0, 0, "queue_full", "not now", 2.0)
    full = post(page_gateway, "/v1/completions", {"prompt": "x"}, headers=FROM_PAGE)
    error(full, 429)
    assert full.headers["Access-Control-Allow-Origin"] == ORIGIN


def test_another_origin_may_not_read_answers(page_gateway: GatewayProcess) -> None:
    headers = {**FROM_PAGE, "Origin": "https://evil.example.com"}
    answer = post(page_gateway, "/v1/completions", {"prompt": "say:hi"}, headers=headers)
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_no_origin_is_known_unless_set(gateway: GatewayProcess) -> None:
    assert preflight(gateway).status_code == 405
    answer = post(gateway, "/v1/completions", {"prompt": "say:hi"}, headers={"Origin": ORIGIN})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
