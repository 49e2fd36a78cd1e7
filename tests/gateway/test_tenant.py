"""Who asks, as schedulers are told: a name made of the API key, never the key."""

from __future__ import annotations

from hashlib import sha256

import pytest
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess
from http_client import complete, post

from sfllm.messages import Submit

KEY = "sk-a-secret-of-somebody"
NAME = sha256(KEY.encode()).hexdigest()[:16]


def tenant(scheduler: FakeScheduler) -> str:
    submit = scheduler.wait_for(Submit)[-1]
    assert isinstance(submit, Submit)
    return submit.tenant


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer   {KEY} "},
        {"X-Api-Key": KEY},
        {"Authorization": "Basic dTpw", "x-api-key": KEY},
        {"Authorization": f"Bearer {KEY}", "x-api-key": "another"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_a_key_names_the_tenant(
    gateway: GatewayProcess, scheduler: FakeScheduler, path: str, headers: dict[str, str]
) -> None:
    bodies = {
        "/v1/completions": {"prompt": "say:x"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/generate": {"text": "say:x"},
    }
    assert post(gateway, path, bodies[path], headers=headers).status_code == 200
    assert tenant(scheduler) == NAME


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", "Token abc"])
def test_without_a_key_nobody_is_named(gateway: GatewayProcess, scheduler: FakeScheduler, value: str) -> None:
    answer = post(gateway, "/v1/completions", {"prompt": "say:x"}, headers={"Authorization": value})
    assert answer.status_code == 200
    assert tenant(scheduler) == ""


def test_without_any_header_nobody_is_named(gateway: GatewayProcess, scheduler: FakeScheduler) -> None:
    complete(gateway, prompt="say:x")
    assert tenant(scheduler) == ""
