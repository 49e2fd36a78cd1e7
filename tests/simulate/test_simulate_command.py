"""`sfllm simulate` as it is called: files, errors, and the same bytes for the same seed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest
from msgspec.structs import replace

from sfllm_cli.errors import CommandError
from sfllm_cli.main import main
from sfllm_cli.simulate import run
from sfllm_cli.simulate.calibrate import Load, fitted
from sfllm_cli.simulate.profiles import PRESETS, load_profile
from sfllm_cli.simulate.workload import Asked, own_names
from sfllm_cli.simulate.world import Setup, World
from sfllm_cli.simulate_settings import SimulateSettings
from sfllm_scheduler.core.cohorts import POLICIES
from sfllm_scheduler.core.state import PolicyValues

FAULTY = [
    *("--profile=cpu", "--workers=3", "--requests=150", "--rate=12", "--tenants=3,1", "--arrivals=bursts"),
    *("--fail-share=0.3", "--slow-share=0.3", "--joining=1", "--policy=fcfs,auto"),
]


def test_the_same_seed_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    made = []
    for hash_seed in ("1", "2"):
        paths = {kind: tmp_path / f"{hash_seed}.{kind}" for kind in ("json", "csv", "png")}
        files = [f"--{kind}={path}" for kind, path in paths.items()]
        done = subprocess.run(
            [sys.executable, "-m", "sfllm_cli", "simulate", *FAULTY, *files],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            timeout=120,
        )
        made.append((done.stdout, {kind: path.read_bytes() for kind, path in paths.items()}))
    assert made[0] == made[1]
    other = tmp_path / "other.json"
    assert run([*FAULTY, "--seed=1", f"--json={other}"]) == 0
    assert other.read_bytes() != made[0][1]["json"]


def test_chats_and_drains_repeat_themselves(tmp_path: Path) -> None:
    fleet = ["--profile=cpu", "--workers=3", "--requests=100", "--rate=8", "--mix=chats"]
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for path in files:
        assert run([*fleet, "--drain-share=0.4", "--policy=prefix,auto", f"--json={path}"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_results_are_complete_and_the_ratio_is_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table = tmp_path / "out.json", tmp_path / "out.csv"
    assert run([*FAULTY, f"--json={out}", f"--csv={table}"]) == 0
    document = json.loads(out.read_text())
    assert [each["policy"] for each in document["runs"]] == ["fcfs", "auto"]
    for each in document["runs"]:
        assert each["finished"] == each["requests"] == 150
        assert each["ttft"]["p50"] <= each["ttft"]["p95"] <= each["ttft"]["p99"]
        assert each["good"] <= each["finished"]
        assert 0 < each["fairness"] <= 1
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["policy"] for row in rows] == ["fcfs", "auto"]
    assert float(rows[0]["ttft_p99"]) == document["runs"][0]["ttft"]["p99"]
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("best goodput over all loads, beside fcfs: auto ")
    )


def test_what_a_run_costs_is_said_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--profile=cpu", "--workers=1", "--requests=20", "--rate=5", "--timing"]) == 0
    printed = capsys.readouterr()
    assert "us a request" in printed.err
    assert "us a request" not in printed.out


def test_the_best_goodput_is_searched_around_the_capacity(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--profile=cpu --workers=2 --requests=60 --mix=equal --policy=fcfs,length --find-goodput"
    assert run(arguments.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    loads = [line.split()[0] for line in lines if line.split()[1:4] == ["of", "capacity", "fcfs"]]
    assert len(set(loads)) == len(loads) >= 7
    assert lines[-1].startswith("best goodput over all loads, beside fcfs: length ")


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:47.9951690,396,109\n"
        "2023-11-16 18:15:49.2224670,879,55\n"
    )
    out = tmp_path / "out.json"
    assert run([f"--trace={trace}", "--requests=30", "--rate=2", f"--json={out}"]) == 0
    (only,) = json.loads(out.read_text())["runs"]
    assert only["finished"] == 30
    tokens = only["output_tokens_per_second"] * only["seconds"]
    assert tokens == pytest.approx(10 * (44 + 109 + 55))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--trace=/no/such/file.csv"], "cannot read"),
        (["--profile=/no/such/profile.json"], "presets are"),
        (["--requests=5", "--rate=1", "--json=/no/such/folder/out.json"], "cannot write"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(arguments: list[str], what: str) -> None:
    with pytest.raises(CommandError, match=what):
        run(arguments)


@pytest.mark.parametrize(
    ("trace", "what"),
    [
        (b"", "the file is empty"),
        (b"time,prompt_tokens,output_tokens\n", "there is no request after the first line"),
        (b"time,prompt_tokens,output_tokens\n0,10,5\n1,many,5\n", "line 3: "),
        (b"time,prompt_tokens\n0,10\n", "output_tokens"),
        (b"\xff\xfe\x00", "codec can't decode"),
    ],
)
def test_a_broken_trace_is_told_in_a_line_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trace: bytes, what: str
) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(trace)
    assert main(["simulate", f"--trace={path}", "--requests=5", "--rate=1"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"sfllm simulate: {path}: ")
    assert what in printed.err
    assert len(printed.err.splitlines()) == 1


def test_an_unknown_profile_is_told_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--profile=tpu", "--requests=5", "--rate=1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sfllm simulate: --profile tpu: ")
    assert line.endswith("presets are " + ", ".join(PRESETS))


@pytest.mark.parametrize(
    "content",
    ['{"source": "x"}', "not json", json.dumps({"block_size": 48, "source": "x"})],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(CommandError, match="is no profile"):
        load_profile(str(path))


def test_a_profile_whose_blocks_do_not_fill_a_chunk_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(msgspec.json.encode(replace(PRESETS["cpu"], block_size=48)))
    with pytest.raises(CommandError, match="does not divide"):
        load_profile(str(path))
    path.write_bytes(msgspec.json.encode(PRESETS["gpu"]))
    assert load_profile(str(path)) == PRESETS["gpu"]


def test_the_policies_are_those_of_the_core() -> None:
    hint = get_type_hints(SimulateSettings)["policy"]
    assert set(get_args(get_args(hint)[0])) == set(POLICIES)


@pytest.mark.parametrize("preset", PRESETS)
def test_calibrating_a_simulated_worker_finds_its_own_curve(preset: str) -> None:
    profile = PRESETS[preset]

    def measure(load: Load, outputs: int) -> tuple[float, float]:
        tokens = load.prompt_tokens + outputs
        asked = (
            Asked(0.01, load.prompt_tokens, outputs, own_names(number, tokens)) for number in range(load.rows)
        )
        setup = Setup(PolicyValues(), profile, workers=1, link_seconds=1e-6)
        figures = World(setup, asked, lambda: 0.0).run()
        return figures.ttft.p50, figures.itl.p50

    curve = fitted(measure, profile.step_tokens)
    for prefill, rows, context in [(512, 0, 0), (100, 0, 0), (0, 16, 8000), (0, 32, 20_000), (256, 8, 2000)]:
        expected = profile.curve.seconds(prefill, rows, context)
        assert curve.seconds(prefill, rows, context) == pytest.approx(expected, rel=0.05)
