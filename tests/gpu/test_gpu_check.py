"""The program that proves the worker on a GPU, as far as it runs without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from bench.gpu_check import ROOT
from bench.gpu_check.__main__ import outcome_of
from bench.gpu_check.checks import Check, noise_to_signal, within


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

    assert outcome_of(Check("a", lambda: "fine"), on_gpu=False).state == "ok"
    assert outcome_of(Check("a", wrong), on_gpu=False)[::2] == ("FAILED", "AssertionError: too far off")
    assert outcome_of(Check("a", broken), on_gpu=False).text.startswith("ZeroDivisionError")
    assert outcome_of(Check("a", broken, needs_gpu=True), on_gpu=False).state == "skipped"


def test_errors_are_relative_above_one_and_a_nan_is_never_within() -> None:
    expected = torch.tensor([100.0, 0.5])
    assert within(torch.tensor([100.9, 0.5]), expected, 1e-2).startswith("largest error 9.0e-03")
    for wrong in (torch.tensor([102.0, 0.5]), torch.tensor([torch.nan, 0.5])):
        with pytest.raises(AssertionError, match="largest error"):
            within(wrong, expected, 1e-2)


def test_noise_is_measured_against_the_spread_of_the_expected_values() -> None:
    expected = torch.tensor([[1.0, 3.0], [11.0, 9.0]])
    assert noise_to_signal(expected + torch.tensor([0.1, -0.1]), expected) == pytest.approx(0.1, rel=1e-5)
