"""`sfllm serve` with the real services: what it prints, what it restarts, how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

READY_SECONDS = 120
END_SECONDS = 30


@pytest.fixture
def serve(smollm2_gguf: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "sfllm_cli", "serve", str(smollm2_gguf), "--port=0"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--max-context-length=256", "--drain-seconds=5", "--worker-wait-seconds=80"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        yield process
        if process.poll() is None:
            process.kill()
        process.wait(END_SECONDS)
    assert process.stdout is not None
    process.stdout.close()


def run(command: str) -> str:
    """What a shell command prints."""
    finished = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=READY_SECONDS, check=True
    )
    return finished.stdout


def child(process: subprocess.Popen[str], module: str) -> psutil.Process:
    return next(found for found in psutil.Process(process.pid).children() if module in found.cmdline())


def test_a_killed_worker_comes_back_and_a_signal_ends_everything(
    serve: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert serve.stdout is not None
    printed = ""
    while " chat --url" not in printed:
        line = serve.stdout.readline()
        assert line, (tmp_path / "log").read_text()
        printed += line
    assert re.search(r"sfllm serves \S+ at http://127\.0\.0\.1:\d+ \(ready after", printed)
    curl = re.search(r"^ +(curl .*)$", printed, re.MULTILINE)
    assert curl is not None
    assert '"max_tokens": 64' in curl[1]
    shorter = curl[1].replace('"max_tokens": 64', '"max_tokens": 4')
    assert '"chat.completion"' in run(f"{shorter} -s -m 60")

    before = child(serve, "sfllm_worker")
    before.kill()
    psutil.wait_procs([before], timeout=END_SECONDS)
    # Asked while no worker is there: the request waits for the new one.
    assert '"chat.completion"' in run(f"{shorter} -s -m 90")
    assert child(serve, "sfllm_worker").pid != before.pid

    children = psutil.Process(serve.pid).children(recursive=True)
    serve.send_signal(signal.SIGTERM)
    assert serve.wait(END_SECONDS) == 0, (tmp_path / "log").read_text()
    assert psutil.wait_procs(children, timeout=1)[1] == []
    assert list(tmp_path.glob("sfllm-*")) == []


def test_made_up_tokens_are_served_without_a_model() -> None:
    command = [sys.executable, "-m", "sfllm_cli", "serve", "--mock", "--port=0", "--model=no/such-model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            printed = "".join(iter(process.stdout.readline, "\n"))
            ready = process.stdout.readline()
            assert "sfllm serves mock at http" in ready, printed
        finally:
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 0, log


def test_a_worker_that_cannot_load_ends_the_command_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    command = [sys.executable, "-m", "sfllm_cli", "serve", str(tmp_path / "broken.gguf"), "--port=0"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=READY_SECONDS, check=False)
    assert finished.returncode == 1
    assert finished.stderr.count("worker-0 |") == 1, "it is not started again: that would not help"
    assert "is not a readable GGUF file" in finished.stderr
