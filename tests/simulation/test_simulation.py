"""The three machines over a faulty network: thousands of scenarios, any of which may find a bug.

`SFLLM_SIMULATION_SEEDS=20000 pytest tests/simulation` runs more of them; `python -m sfllm_simulation` in
this folder too, and prints what happened in them.
"""

from __future__ import annotations

import os

import pytest
from sfllm_simulation.report import failing
from sfllm_simulation.run import run
from sfllm_simulation.scenario import scenario
from sfllm_simulation.script import read_script

SEEDS = int(os.environ.get("SFLLM_SIMULATION_SEEDS", "300"))
PART = 25


@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_every_accepted_request_ends_once_and_whole_whatever_the_network_does(first: int) -> None:
    for seed in range(first, min(first + PART, SEEDS)):
        script = scenario(seed)
        result = run(script)
        if result.failure is not None:
            pytest.fail(f"seed {seed}: {failing(script, result.failure)}", pytrace=False)


def test_a_scenario_runs_the_same_way_every_time() -> None:
    first, second = run(scenario(5)), run(scenario(5))
    assert first == second
    assert first.events > 500


def test_the_scenarios_reach_what_they_are_meant_to_reach() -> None:
    """A simulation in which nothing goes wrong proves nothing."""
    happened = run(scenario(0)).happened
    for seed in range(1, 120):
        result = run(scenario(seed))
        happened += result.happened
        happened.update(result.outcomes)
        happened["moves"] += result.moves
    for what in (
        "killed",
        "stood still",
        "worker left",
        "gateway left",
        "worker_lost",
        "gateway_lost",
        "worker_draining",
        "interrupted",
        "cancelled",
        "moves",
        "finished",
        "left",
        "cut off",
        "deadline_exceeded",
        "engine_failure",
    ):
        assert happened[what] >= 3, (what, happened)


def test_without_faults_every_request_finishes_at_its_first_attempt() -> None:
    lines = ["seed 1, 2 gateways, 2 workers of 4 slots and 256 cache tokens, steps of 20 ms"]
    lines += [
        f"t=0.{request} gateway-{request % 2} opens request {request}: prompt 20 tokens, n={1 + request % 3}, "
        "at most 20 tokens, priority 0, logprobs -1, deadline 600 s"
        for request in range(1, 9)
    ]
    result = run(read_script("\n".join(lines)))
    assert result.failure is None
    assert result.outcomes == {"finished": 8}
    assert result.moves == 0
