"""Scenarios that are written by hand, for what is promised in so many words."""

from __future__ import annotations

import pytest
from sfllm_simulation.report import failing
from sfllm_simulation.run import Result, run
from sfllm_simulation.script import read_script

STREAM_SECONDS = 0.5
EVERY_SECONDS = 0.02
LASTING = 600.0


def request(number: int, t: float, gateway: int = 0, prompt: int = 20, n: int = 1, tokens: int = 20) -> str:
    return (
        f"t={t:g} gateway-{gateway} opens request {number}: prompt {prompt}, n {n}, tokens {tokens}, "
        f"priority 0, tenant a, logprobs -1, deadline {LASTING:g} s"
    )


def play(*lines: str) -> Result:
    script = read_script("\n".join(lines))
    result = run(script)
    if result.failure is not None:
        pytest.fail(failing(script, result.failure), pytrace=False)
    return result


def test_without_faults_every_request_finishes_at_its_first_attempt() -> None:
    setup = "seed 1, 2 gateways, 2 workers of 4 slots and 256 cache tokens, steps of 20 ms, policy auto"
    requests = [request(number, number / 10, number % 2, n=1 + number % 3) for number in range(1, 9)]
    result = play(setup, *requests)
    assert result.outcomes == {"finished": 8}
    assert result.moves == 0


@pytest.mark.parametrize(
    ("fault", "workers"),
    [
        ("worker-0 crashes, back after 0.3 s", 1),
        ("worker-0 crashes, back after 0.3 s", 2),
        ("worker-0 fails a step, back after 0.3 s", 2),
        ("worker-0 drains, back after 0.3 s", 2),
        ("worker-0 stands still for 5 s", 2),
        ("worker-0 stands still for 1 s", 1),
        ("worker-0 takes 4.5 s for a step", 1),
        ("scheduler crashes, back after 0.3 s", 1),
        ("scheduler stands still for 5 s", 1),
        ("gateway-0 stands still for 5 s", 1),
        ("scheduler to worker-0 is cut for 5 s", 1),
        ("worker-0 to scheduler is cut for 5 s", 1),
        ("scheduler to gateway-0 is cut for 5 s", 1),
        ("gateway-0 to scheduler is cut for 5 s", 1),
        ("scheduler to gateway-0 drops 100%, doubles 0%, delays 0% for 0.03 s", 1),
        ("gateway-0 to scheduler drops 100%, doubles 0%, delays 0% for 0.03 s", 1),
        ("scheduler to worker-0 drops 100%, doubles 0%, delays 0% for 0.03 s", 1),
        ("worker-0 to scheduler drops 100%, doubles 0%, delays 0% for 0.03 s", 1),
    ],
)
def test_a_fault_at_any_moment_of_a_stream_costs_time_and_nothing_else(fault: str, workers: int) -> None:
    setup = (
        f"seed 1, 1 gateways, {workers} workers of 4 slots and 256 cache tokens, steps of 20 ms, policy auto"
    )
    for moment in range(int(STREAM_SECONDS / EVERY_SECONDS)):
        at = 0.65 + moment * EVERY_SECONDS
        result = play(setup, request(1, 0.7), request(2, 0.7, n=2), f"t={at:g} {fault}")
        assert result.outcomes == {"finished": 2}


@pytest.mark.parametrize("link", ["worker-0 to scheduler", "scheduler to gateway-0"])
def test_tokens_that_got_lost_are_sent_again_and_nothing_is_computed_again(link: str) -> None:
    setup = "seed 1, 1 gateways, 1 workers of 4 slots and 256 cache tokens, steps of 20 ms, policy auto"
    for moment in range(10):
        lost = f"t={1.2 + moment * EVERY_SECONDS:g} {link} drops 100%, doubles 0%, delays 0% for 0.05 s"
        result = play(setup, request(1, 0.7, tokens=60), lost)
        assert result.outcomes == {"finished": 1}
        assert result.moves == 0


def test_restarting_every_process_one_after_another_under_load_loses_nothing() -> None:
    setup = "seed 1, 2 gateways, 3 workers of 4 slots and 256 cache tokens, steps of 20 ms, policy auto"
    requests = [request(number, number / 5, number % 2, tokens=60) for number in range(1, 60)]
    drains = [
        f"t={2 + 2 * place} {process} drains, back after 0.5 s"
        for place, process in enumerate(("worker-0", "worker-1", "worker-2", "gateway-0", "gateway-1"))
    ]
    result = play(setup, *requests, *drains, "t=12 scheduler crashes, back after 0.5 s")
    assert result.outcomes == {"finished": 59}


@pytest.mark.parametrize("how", ["kills", "breaks"])
@pytest.mark.parametrize("token", [0, 7, 20])
def test_a_poisonous_request_among_forty_innocents_is_found_and_they_finish(how: str, token: int) -> None:
    setup = "seed 1, 1 gateways, 3 workers of 16 slots and 4096 cache tokens, steps of 20 ms, policy auto"
    requests = [request(number, 1.0, tokens=40) for number in range(1, 42)]
    result = play(setup, *requests, f"t=0 request 20 {how} every worker at token {token}")
    assert result.outcomes == {"finished": 40, "engine_failure": 1}


def test_a_request_that_kills_workers_late_is_found_too() -> None:
    """Long after it was cleared of the last crash."""
    setup = "seed 1, 1 gateways, 2 workers of 8 slots and 512 cache tokens, steps of 20 ms, policy auto"
    requests = [request(number, 1.0 + number / 10, prompt=17, tokens=80) for number in range(1, 9)]
    result = play(
        setup,
        *requests,
        "t=0 request 3 kills every worker at token 60",
        "t=1.9 worker-0 crashes, back after 0.3 s",
        "t=2.1 worker-1 crashes, back after 0.3 s",
    )
    assert result.outcomes["engine_failure"] <= 1
    assert result.outcomes["finished"] >= 7


def test_what_a_killed_gateway_had_asked_for_is_cancelled_and_others_go_on() -> None:
    setup = "seed 1, 2 gateways, 1 workers of 4 slots and 256 cache tokens, steps of 60 ms, policy auto"
    requests = [request(number, 0.6, number % 2, tokens=100) for number in range(1, 5)]
    result = play(setup, *requests, "t=1.5 gateway-1 crashes, back after 600 s")
    assert result.outcomes == {"finished": 2, "cut off": 2}


@pytest.mark.parametrize("link", ["scheduler to worker-0", "worker-0 to scheduler"])
def test_a_worker_that_is_cut_off_lets_go_of_what_another_goes_on_with(link: str) -> None:
    setup = "seed 1, 1 gateways, 2 workers of 4 slots and 256 cache tokens, steps of 60 ms, policy auto"
    requests = [request(number, 0.7, tokens=100) for number in range(1, 5)]
    result = play(setup, *requests, f"t=1.5 {link} is cut for 20 s")
    assert result.outcomes == {"finished": 4}
    assert result.moves >= 1
