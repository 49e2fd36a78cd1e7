"""Scenarios as text."""

from __future__ import annotations

import pytest
from sfllm_simulation.scenario import scenario
from sfllm_simulation.script import KINDS, Open, ScriptError, read_script


def test_what_is_written_is_read_back_and_written_the_same_way() -> None:
    seen = set()
    for seed in range(200):
        script = scenario(seed)
        assert read_script(str(script)).setup == script.setup
        assert str(read_script(str(script))) == str(script)
        seen |= set(map(type, script.events))
    assert seen == set(KINDS)


def test_a_line_that_is_none_of_the_kinds_is_refused_with_its_words() -> None:
    setup = "seed 1, 1 gateways, 1 workers of 4 slots and 256 cache tokens, steps of 20 ms, policy auto"
    with pytest.raises(ScriptError, match="worker-0 explodes"):
        read_script(f"{setup}\nt=1 worker-0 explodes")
    with pytest.raises(ScriptError, match="not a setup"):
        read_script("")


def test_a_request_that_is_dropped_takes_its_other_lines_along() -> None:
    script = next(
        script
        for script in map(scenario, range(100))
        if sum(getattr(event, "request", None) == 1 for event in script.events) > 1
    )
    opened = next(event for event in script.events if isinstance(event, Open) and event.request == 1)
    kept = script.without([opened]).events
    assert not [event for event in kept if getattr(event, "request", None) == 1]
    assert len(kept) < len(script.events) - 1
