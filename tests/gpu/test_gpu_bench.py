"""The program that measures the worker on a GPU, as far as it runs without one."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.gpu_bench.__main__ import run
from bench.gpu_bench.place import Place
from bench.gpu_bench.processes import run_within
from bench.gpu_bench.report import NOTHING, TITLES, cell, report, table
from bench.gpu_bench.results import CHECK, RESULTS, ROOT, Results, merged
from bench.gpu_bench.steps import idle_share
from rerun_recorder import make_decoder

MADE = {"date": "2031-05-04", "device": "a GPU", "versions": "torch 2.11", "commit": "abc"}


def gpu_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu_bench", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def test_a_stage_measures_on_a_cpu_and_the_report_says_what_is_missing(tmp_path: Path) -> None:
    process = gpu_bench("trace", "--device=cpu", "--quick", f"--out={tmp_path}")
    assert process.returncode == 0, process.stdout + process.stderr
    [row] = json.loads((tmp_path / RESULTS).read_text())["trace"]["rows"]
    assert 0 <= row["idle %"] < 100
    text = (tmp_path / "gpu-report.md").read_text()
    assert text.count(NOTHING) == len(TITLES) - 1


def test_a_stage_that_fails_is_kept_with_its_error_and_no_figure(tmp_path: Path) -> None:
    arguments = argparse.Namespace(device="cpu", out=tmp_path, quick=True, commit="abc", stage_seconds=100.0)
    assert not run("no such stage", arguments)
    part = Results(tmp_path / RESULTS).parts["no such stage"]
    assert "invalid choice" in part["error"]
    assert "rows" not in part


def test_a_stage_that_takes_too_long_is_stopped_with_all_that_it_started() -> None:
    code, said = run_within(["sh", "-c", "sleep 300 & echo $! >&2; wait"], 5.0)
    assert code is None
    started = Path("/proc", said.strip(), "stat")
    # A process that ended may stay listed until whoever inherited it takes notice.
    assert not started.exists() or started.read_text().rpartition(")")[2].split()[0] in {"Z", "X"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_nothing_is_measured_or_written(tmp_path: Path) -> None:
    process = gpu_bench("device", f"--out={tmp_path}", f"--report={tmp_path / 'report.md'}")
    assert process.returncode == 2
    assert not list(tmp_path.iterdir())


def test_the_committed_report_is_what_the_program_writes_and_has_no_figures_without_a_device() -> None:
    committed = (ROOT / "docs" / "gpu-report.md").read_text()
    if NOTHING in committed and "commit " not in committed.partition("## Targets")[2]:
        assert committed == report(Results(Path("no such file")))
        assert "not measured" in committed
    else:
        assert re.search(r"^\d{4}-\d\d-\d\d .*, .*torch .*commit ", committed, re.MULTILINE)


def test_targets_are_compared_with_what_was_measured(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    results.keep("decode", {**MADE, "rows": [{"batch": 1, "% of floor": 44.9, "eager / graphs": 2.5}]})
    results.keep("trace", {**MADE, "rows": [{"batch": 64, "idle %": 4.0}]})
    text = report(Results(tmp_path / "results.json"))
    assert "| decode at batch 1, % of the floor | >= 45 | 44.9 | no |" in text
    assert "| graphs at batch 1, times eager | >= 2 | 2.50 | yes |" in text
    assert "| idle in a steady decode trace, batch 64, % | <= 5 | 4.00 | yes |" in text
    assert "| decode at batch 64, % of the floor | >= 75 | not measured | - |" in text


def test_a_part_that_failed_is_told_with_its_error(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    results.keep("serving", {**MADE, "error": "RuntimeError: 3 requests failed"})
    section = report(results).partition("## The stack over HTTP")[2]
    assert "The stage failed: RuntimeError: 3 requests failed" in section.partition("## ")[0]


def test_a_part_that_broke_off_shows_what_it_had_measured(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    rows = [{"load": "a", "requests/s": 90.0}]
    results.keep("serving", {**MADE, "rows": rows, "unfinished": True, "error": "it took longer than 480 s"})
    section = report(results).partition("## The stack over HTTP")[2].partition("## ")[0]
    assert "it took longer than 480 s" in section
    assert "| a | 90.0 |" in section


def test_results_of_several_runs_add_up_and_a_failure_replaces_no_figure() -> None:
    good, failed = {**MADE, "rows": [{"batch": 1}]}, {**MADE, "error": "no memory"}
    assert merged([{"trace": good}, {"trace": failed, "decode": failed}]) == {"trace": good, "decode": failed}
    assert merged([{"trace": failed}, {"trace": good}]) == {"trace": good}

    def checks(commit: str, **outcomes: str) -> dict[str, dict[str, object]]:
        rows = [{"check": name, "outcome": state} for name, state in outcomes.items()]
        return {CHECK: {**MADE, "commit": commit, "rows": rows}}

    both = merged([checks("abc", a="FAILED", b="ok"), checks("abc", a="ok", b="not run", c="ok")])
    assert both == checks("abc", a="ok", b="ok", c="ok")
    assert merged([checks("abc", a="ok"), checks("def", b="ok")]) == checks("def", b="ok")


def test_tables_keep_three_digits_and_mark_what_is_missing() -> None:
    rows = [{"a": 1234.5, "b": 0.012345}, {"a": 7, "c": "x|y"}]
    assert table(rows).splitlines()[2:] == ["| 1234 | 0.0123 | - |", "| 7 | - | x\\|y |"]
    assert [cell(value) for value in (None, 100.0, 12.0, 0.5)] == ["-", "100", "12.0", "0.500"]


@pytest.mark.parametrize(
    ("busy", "share"),
    [
        ([(0, 10)], 0.0),
        ([(0, 4), (6, 10)], 0.2),
        ([(6, 10), (0, 4), (1, 2)], 0.2),
        ([(0, 8), (2, 5), (9, 10)], 0.1),
    ],
)
def test_idle_is_what_no_interval_covers(busy: list[tuple[float, float]], share: float) -> None:
    assert idle_share(busy) == pytest.approx(share)


def test_a_step_reads_every_weight_of_products_once_and_the_contexts() -> None:
    place = Place.of("cpu", quick=True)
    decoder = make_decoder()  # of the same size, but its embedding, of which a step reads rows, is not tied
    config = decoder.config
    norms = (2 * config.num_layers + 1) * config.hidden_size
    embedding = config.vocab_size * config.hidden_size
    assert place.step_bytes([]) == decoder.weight_bytes - 4 * (norms + embedding)
    assert place.step_bytes([3, 4]) - place.step_bytes([]) == 2 * 4 * 7 * config.num_layers * config.kv_size
