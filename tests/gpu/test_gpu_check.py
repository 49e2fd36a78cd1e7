"""The program that proves the worker on a GPU, as far as it runs without one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bench.gpu_check import ROOT
from bench.gpu_check.__main__ import run_hand
from bench.gpu_check.checks import Check, noise_to_signal, within
from bench.gpu_check.child import outcome_of
from bench.gpu_check.journal import Journal, Outcome, summary

BREAKING = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from bench.gpu_check.child import run_checks
from bench.gpu_check.journal import Journal

def check(title, run, seconds=100.0):
    return SimpleNamespace(title=title, run=run, needs_gpu=False, seconds=seconds)

checks = [
    check("good", lambda: "fine"),
    check("crashes", lambda: os.kill(os.getpid(), signal.SIGSEGV) or ""),
    check("hangs", lambda: time.sleep(300) or "", seconds=0.5),
    check("wrong", lambda: str(1 / 0)),
    check("last", lambda: "fine too"),
]
sys.exit(run_checks(Journal(Path(sys.argv[1])), checks, on_gpu=False))
"""
"""Checks of which some take their process with them; without torch, which takes seconds to import."""


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu_check", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def test_kernels_and_graph_discipline_are_checked_without_a_gpu() -> None:
    process = gpu_check("--device", "cpu", "--only", "norm", "QK-norm", "products", "graphs: ", "steady")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "ok      QK-norm, RoPE and KV write float16" in process.stdout
    assert "ok      graphs: replay equals eager launches" in process.stdout
    assert "skipped steady steps do not wait for the device: needs a GPU" in process.stdout
    assert "0 failed, 1 skipped" in process.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_nothing_counts_as_proven() -> None:
    process = gpu_check("layers")
    assert process.returncode == 2
    assert "no usable GPU" in process.stderr


def test_a_check_that_fails_or_breaks_is_a_failure_and_the_others_go_on() -> None:
    def wrong() -> str:
        raise AssertionError("too far off")

    def broken() -> str:
        return str(1 / 0)

    def outcome(check: Check) -> Outcome:
        found, fit = outcome_of(check, on_gpu=False)
        assert fit
        return found

    assert outcome(Check("a", lambda: "fine")).state == "ok"
    assert outcome(Check("a", wrong))[::2] == ("FAILED", "AssertionError: too far off")
    assert outcome(Check("a", broken)).text.startswith("ZeroDivisionError")
    assert outcome(Check("a", broken, needs_gpu=True)).state == "skipped"


def test_a_check_that_takes_its_process_with_it_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    command = [sys.executable, "-c", BREAKING, str(path)]
    outcomes = run_hand(command, "some", path, time.monotonic() + 200)
    states = {outcome.title: outcome.state for outcome in outcomes}
    assert states == {"good": "ok", "crashes": "FAILED", "hangs": "FAILED", "wrong": "FAILED", "last": "ok"}
    texts = {outcome.title: outcome.text for outcome in outcomes}
    assert "ended with -11" in texts["crashes"]
    assert "Timeout" in texts["hangs"]
    assert "in <lambda>" in texts["hangs"]


def test_a_process_that_cannot_start_is_told_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no module here')"]
    [outcome] = run_hand(command, "layers", tmp_path / "journal.jsonl", time.monotonic() + 100)
    assert outcome[:2] == ("FAILED", "layers: starting")
    assert "no module here" in outcome.text


def test_checks_that_were_never_reached_are_told_and_count_as_such(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.plan(["a", "b", "c"])
    journal.begin("a")
    journal.end(Outcome("ok", "a", "fine"))
    journal.begin("b")
    again = Journal(tmp_path / "journal.jsonl")
    assert again.broken_off == "b"
    assert [outcome.state for outcome in again.all_outcomes()] == ["ok", "not run", "not run"]
    assert summary(again.all_outcomes()).endswith("1 passed, 0 failed, 0 skipped, 2 not run")


def test_errors_are_relative_above_one_and_a_nan_is_never_within() -> None:
    expected = torch.tensor([100.0, 0.5])
    assert within(torch.tensor([100.9, 0.5]), expected, 1e-2).startswith("largest error 9.0e-03")
    for wrong in (torch.tensor([102.0, 0.5]), torch.tensor([torch.nan, 0.5])):
        with pytest.raises(AssertionError, match="largest error"):
            within(wrong, expected, 1e-2)


def test_noise_is_measured_against_the_spread_of_the_expected_values() -> None:
    expected = torch.tensor([[1.0, 3.0], [11.0, 9.0]])
    assert noise_to_signal(expected + torch.tensor([0.1, -0.1]), expected) == pytest.approx(0.1, rel=1e-5)
