"""Gateways in front of two schedulers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import requests
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess
from http_client import complete, open_stream, rest, text_of, wait_until

from sfllm.messages import Submit

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
TOKENS_OF_A_CHUNK = 64


@pytest.fixture
def pair() -> Iterator[list[FakeScheduler]]:
    both = [FakeScheduler(), FakeScheduler()]
    yield both
    for fake in both:
        fake.close()


def addresses(pair: list[FakeScheduler]) -> tuple[str, str]:
    return (
        f"--gateway-address={','.join(each.gateway_address for each in pair)}",
        f"--asset-address={','.join(each.asset_address for each in pair)}",
    )


def submitted(scheduler: FakeScheduler) -> set[str]:
    return {message.request_id for message in scheduler.of(Submit) if isinstance(message, Submit)}


def start_connected(start: Callable[..., GatewayProcess], pair: list[FakeScheduler]) -> GatewayProcess:
    gateway = start(pair[0], *addresses(pair))
    gateway.wait_ready()
    gateway.wait_until(lambda: gateway.metric("gateway_schedulers_connected") == 2)
    return gateway


def test_all_gateways_send_prompts_that_begin_alike_to_the_same_scheduler_and_spread_others(
    start: Callable[..., GatewayProcess], pair: list[FakeScheduler]
) -> None:
    gateways = [start_connected(start, pair), start_connected(start, pair)]
    for beginning in range(12):
        prompt = [65 + beginning] * TOKENS_OF_A_CHUNK
        before = [len(submitted(each)) for each in pair]
        for tail in (65, 66):
            for gateway in gateways:
                complete(gateway, prompt=[*prompt, tail], max_tokens=1)
        more = [len(submitted(each)) - count for each, count in zip(pair, before, strict=True)]
        assert sorted(more) == [0, 4]
    assert all(submitted(each) for each in pair)


def test_streams_of_a_scheduler_that_is_gone_go_on_at_the_other_and_new_ones_go_there(
    start: Callable[..., GatewayProcess], pair: list[FakeScheduler]
) -> None:
    gateway = start_connected(start, pair)
    for each in pair:
        each.script.pause_at = 5
    _, lines = open_stream(gateway)
    wait_until(lambda: gateway.metric("generation_tokens_total") == 5, "no five tokens")
    lost, other = sorted(pair, key=lambda each: not submitted(each))
    other.resume()
    lost.close()
    assert text_of(rest(lines)) == ALPHABET
    [submit] = other.of(Submit)
    assert isinstance(submit, Submit)
    assert (submit.attempt, submit.generated_counts) == (1, (5,))
    assert gateway.metric("gateway_schedulers_connected") == 1
    assert requests.get(f"{gateway.url}/ready", timeout=5).status_code == 200
    for _ in range(8):
        complete(gateway, prompt="say:x")
    assert len(other.of(Submit)) == 9


def test_a_scheduler_that_is_gone_is_noticed_by_its_connection_long_before_its_lease_ends(
    start: Callable[..., GatewayProcess], pair: list[FakeScheduler]
) -> None:
    for each in pair:
        each.lease_seconds = 600.0
    gateway = start_connected(start, pair)
    pair[0].close()
    gateway.wait_until(lambda: gateway.metric("gateway_schedulers_connected") == 1)


def test_a_gateway_is_ready_although_one_of_its_schedulers_never_was(
    start: Callable[..., GatewayProcess], pair: list[FakeScheduler]
) -> None:
    pair[0].close()
    gateway = start(pair[0], *addresses(pair))
    gateway.wait_ready()
    assert complete(gateway, prompt="say:x")["choices"][0]["text"] == "x"
