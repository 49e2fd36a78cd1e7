"""The three machines over a faulty network: thousands of scenarios, any of which may find a bug.

`SFLLM_SIMULATION_SEEDS=20000 pytest tests/simulation` runs more of them; so does
`python -m sfllm_simulation` in this folder, which also prints what happened in them.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from sfllm_simulation.report import failing
from sfllm_simulation.run import Result, run
from sfllm_simulation.scenario import scenario
from sfllm_simulation.script import Script, read_script

SEEDS = int(os.environ.get("SFLLM_SIMULATION_SEEDS", "300"))
PART = 25
REACHED_IN = 75
FOUND = sorted((Path(__file__).parent / "found").glob("*.txt"))


def passing(script: Script, name: str) -> Result:
    """Run a script; when it fails, say so with the shortest one that does."""
    result = run(script)
    if result.failure is not None:
        pytest.fail(f"{name}: {failing(script, result.failure)}", pytrace=False)
    return result


@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_every_accepted_request_ends_once_and_whole_whatever_the_network_does(first: int) -> None:
    for seed in range(first, min(first + PART, SEEDS)):
        passing(scenario(seed), f"seed {seed}")


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_what_a_simulation_once_found_stays_repaired(path: Path) -> None:
    for seed in range(3):
        script = read_script(path.read_text())
        script = script._replace(setup=script.setup.with_seed(script.setup.seed + seed))
        passing(script, path.stem)


def test_a_scenario_runs_the_same_way_every_time() -> None:
    first, second = run(scenario(5)), run(scenario(5))
    assert first == second
    assert first.events > 500


def test_the_scenarios_reach_what_they_are_meant_to_reach() -> None:
    """A simulation in which nothing goes wrong proves nothing."""
    happened = Counter[str]()
    for seed in range(REACHED_IN):
        result = run(scenario(seed))
        happened += result.happened + result.outcomes + Counter(moves=result.moves)
    expected = {
        *("killed", "stood still", "worker left", "gateway left", "worker_lost", "gateway_lost"),
        *("worker_draining", "worker_failed", "interrupted", "reconciled", "quarantined", "dropped", "moves"),
        *("finished", "left", "cut off", "deadline_exceeded", "engine_failure"),
    }
    assert expected - set(happened) == set()
