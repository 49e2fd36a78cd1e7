"""A client that leaves, in each state that its request can be in: nothing of it stays anywhere."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from fake_scheduler import ASSET_FILES, FakeScheduler, model_card
from gateway_process import GatewayProcess
from http_client import begin, complete, wait_until

from sfllm.asset_pull import asset_of
from sfllm.messages import Cancel, ModelState, Submit

COMPLETIONS = "/v1/completions"
ENDLESS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"


def leaves(
    gateway: GatewayProcess, meanwhile: Callable[[], object], path: str = COMPLETIONS, **body: object
) -> None:
    """Send a request, wait for `meanwhile`, close the connection, and see the request gone."""
    before = gateway.metric("disconnected_clients_total")
    client = begin(gateway, path, body)
    wait_until(lambda: gateway.metric("gateway_open_requests") == 1, "it did not come")
    meanwhile()
    client.close()
    wait_until(lambda: gateway.metric("gateway_open_requests") == 0, "still open")
    assert gateway.metric("disconnected_clients_total") == before + 1
    assert gateway.metric("gateway_journal_bytes") == 0


def last_cancel(scheduler: FakeScheduler) -> Cancel:
    cancel = scheduler.wait_for(Cancel)[-1]
    assert isinstance(cancel, Cancel)
    return cancel


@pytest.mark.parametrize("streaming", [True, False])
def test_before_the_scheduler_has_it(
    gateway: GatewayProcess, scheduler: FakeScheduler, streaming: bool
) -> None:
    scheduler.script.ignore_submits = 1000
    leaves(gateway, lambda: scheduler.wait_for(Submit), prompt="x", stream=streaming)
    assert last_cancel(scheduler).attempt == 0


@pytest.mark.parametrize("streaming", [True, False])
def test_in_the_queue(gateway: GatewayProcess, scheduler: FakeScheduler, streaming: bool) -> None:
    scheduler.script.pause_at = 0
    leaves(
        gateway, lambda: wait_until(lambda: scheduler.running == 1, "queued"), prompt="x", stream=streaming
    )
    wait_until(lambda: scheduler.running == 0, "not cancelled")


@pytest.mark.parametrize("streaming", [True, False])
def test_between_two_attempts(gateway: GatewayProcess, scheduler: FakeScheduler, streaming: bool) -> None:
    scheduler.script.pause_at = 3

    def lose_the_worker() -> None:
        wait_until(lambda: scheduler.running == 1, "not running")
        scheduler.script.ignore_submits = 1000
        scheduler.script.interrupt_at = [3]
        scheduler.wait_for(Submit, 2)

    leaves(gateway, lose_the_worker, prompt="x", max_tokens=20, stream=streaming)
    assert last_cancel(scheduler).attempt >= 1
    assert not scheduler.running


def test_while_no_scheduler_is_there(start: Callable[..., GatewayProcess]) -> None:
    first = FakeScheduler()
    gateway = start(first)
    gateway.wait_ready()
    first.script.pause_at = 1

    def lose_the_scheduler() -> None:
        wait_until(lambda: first.running == 1, "not running")
        first.close()
        gateway.wait_ready(503)

    leaves(gateway, lose_the_scheduler, prompt="x", stream=True)
    second = FakeScheduler(first.gateway_address, first.asset_address)
    try:
        gateway.wait_ready()
        assert not second.of(Submit)
    finally:
        second.close()


def test_while_its_chat_is_rendered(
    own_scheduler: FakeScheduler, start: Callable[..., GatewayProcess]
) -> None:
    files = {**ASSET_FILES, "chat_template.jinja": ENDLESS.encode()}
    assets = tuple(asset_of(name, content) for name, content in files.items())
    own_scheduler.files = {asset_of("", content).sha256: content for content in files.values()}
    own_scheduler.models = (ModelState(msgspec.structs.replace(model_card(), assets=assets), 1),)
    gateway = start(own_scheduler)
    gateway.wait_ready()
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for _ in range(4):  # more than there are processes that render: each is free again at once
        leaves(gateway, lambda: None, "/v1/chat/completions", **chat)
    complete(gateway, prompt="say:x")
    assert len(own_scheduler.of(Submit)) == 1
    assert "unexpected failure" not in gateway.log()
