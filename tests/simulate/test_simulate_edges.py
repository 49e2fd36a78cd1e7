"""The edges of what can be asked of `sfllm simulate`: one request, all at once, no time, no room."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NoReturn

import pytest
from msgspec.structs import replace

from sfllm_cli.bench.trace import Entry
from sfllm_cli.errors import CommandError
from sfllm_cli.simulate.command import capacity, fleet_profile, run
from sfllm_cli.simulate.figures import Collector, Figures, WorkerCounts
from sfllm_cli.simulate.gateways import Ask
from sfllm_cli.simulate.report import Run, ratios
from sfllm_cli.simulate.workload import CHATS_AT_ONCE_RATE, Asked, of_chats, of_trace, own_names
from sfllm_cli.simulate_settings import SimulateSettings

SMALL = ["--profile=cpu", "--workers=1"]


def strict(text: str) -> dict[str, object]:
    """A JSON document as the standard has it: without Infinity and NaN."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"{word} is no JSON")

    document = json.loads(text, parse_constant=refuse)
    assert isinstance(document, dict)
    return document


def figures_of(ends: list[float]) -> Figures:
    """Of requests that all come at 1 and end at these times."""
    collector = Collector(2.0, 0.05)
    for number, at in enumerate(ends, start=1):
        asked = Asked(1.0, 10, 2, own_names(number, 12))
        ask = Ask(asked, number)
        ask.first, ask.ended = 1.5, at
        collector.came(asked)
        collector.end(ask)
    return collector.figures(WorkerCounts(0, 0, 0), 0, 0)


@pytest.mark.parametrize("how", [["--load=0.8"], ["--find-goodput"], ["--rate=inf"]])
def test_one_request_is_load_enough(how: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert run([*SMALL, "--requests=1", "--fail-share=1", *how, f"--json={out}"]) == 0
    runs = strict(out.read_text())["runs"]
    assert isinstance(runs, list)
    assert all(each["finished"] == 1 and 0 < each["steady_per_second"] < 100 for each in runs)


def test_chats_that_come_at_once_are_those_that_come_one_after_the_other(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert run([*SMALL, "--mix=chats", "--requests=40", "--rate=inf", f"--json={out}"]) == 0
    document = strict(out.read_text())
    runs, settings = document["runs"], document["settings"]
    assert isinstance(runs, list)
    assert isinstance(settings, dict)
    assert runs[0]["finished"] == 40
    tokens = sum(each.output_tokens for each in of_chats(CHATS_AT_ONCE_RATE, 40, random.Random(0)))
    assert runs[0]["output_tokens_per_second"] * runs[0]["seconds"] == pytest.approx(tokens)
    assert settings["rate"] == [None]
    assert runs[0]["rate"] is None


def test_an_endless_load_is_written_as_null(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert run([*SMALL, "--requests=5", "--load=inf", f"--json={out}"]) == 0
    runs = strict(out.read_text())["runs"]
    assert isinstance(runs, list)
    assert runs[0]["load"] is None


def test_the_capacity_is_the_fleets_whatever_is_done_to_it() -> None:
    settings = SimulateSettings(profile="cpu", workers=1, requests=60)
    profile = fleet_profile(settings)
    served = capacity(settings, profile, None)
    for other in (
        replace(settings, deadline_seconds=2.0),
        replace(settings, max_queue_requests=1),
        replace(settings, schedulers=3, kill_scheduler_at=1.5, restart_scheduler_after=2.0),
        replace(settings, fail_share=1.0, joining=4),
    ):
        assert capacity(other, profile, None) == served


def test_a_fleet_that_can_serve_nothing_has_no_capacity(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time,prompt_tokens,output_tokens\n0,20000,5\n")
    with pytest.raises(CommandError, match="serve none of these requests"):
        run([*SMALL, "--requests=3", f"--trace={trace}"])


def test_what_ends_at_one_moment_is_served_at_a_rate_all_the_same() -> None:
    assert figures_of([3.0] * 8).steady_per_second == pytest.approx(8 / 2)
    assert figures_of([3.0]).steady_per_second == pytest.approx(1 / 2)
    # Four at a time, each second: the middle half is not ten a second because it ends with a whole group.
    groups = [float(second) for second in range(2, 12) for _ in range(4)]
    assert figures_of(groups).steady_per_second == pytest.approx(4.0)
    assert figures_of([]).steady_per_second == 0.0


def test_a_trace_of_one_moment_comes_again_at_the_rate() -> None:
    times = [each.at for each in of_trace([Entry(0.0, 10, 5)], 4.0, 100)]
    assert times == [pytest.approx(number / 4) for number in range(100)]


@pytest.mark.parametrize(
    "arguments",
    ["--max-queue-requests=0", "--max-overtakes=-1", "--deadline-seconds=inf", "--restart-scheduler-after=1"],
)
def test_what_cannot_be_is_refused_at_once(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run([*SMALL, "--requests=3", "--rate=1", arguments])
    assert arguments.split("=", maxsplit=1)[0] in capsys.readouterr().err


def test_a_restart_needs_a_kill() -> None:
    with pytest.raises(CommandError, match="--kill-scheduler-at"):
        run([*SMALL, "--schedulers=2", "--restart-scheduler-after=5"])


def test_the_help_says_what_policies_are_compared_with_and_whose_overtakes_are_bounded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "several are compared, each with fcfs or else the last one" in text
    assert "times a waiting request may be passed, for each worker" in text

    def beside(*policies: str) -> str:
        return ratios([Run(policy, 1.0, 1.0, figures_of([2.0])) for policy in policies])[-1]

    assert "beside fcfs: auto" in beside("fcfs", "auto")
    assert "beside auto: length" in beside("length", "auto")


def test_where_results_go_is_no_part_of_them(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert run([*SMALL, "--requests=2", "--rate=1", f"--json={out}", f"--csv={tmp_path / 'o.csv'}"]) == 0
    settings = strict(out.read_text())["settings"]
    assert isinstance(settings, dict)
    assert not {"json", "csv", "png", "profile_out", "timing", "calibrate"} & set(settings)
    assert str(tmp_path) not in out.read_text()
