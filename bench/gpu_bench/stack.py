"""Stages through the whole stack: `sfllm serve` in processes of its own, `sfllm bench` against it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.gpu_bench.place import Place, Row
from bench.gpu_check.serving import stack


class Load(NamedTuple):
    """A load, and the flags of `sfllm bench` that make it."""

    title: str
    flags: tuple[str, ...]


def lengths(prompt: str, output: str) -> tuple[str, ...]:
    """Flags of tokens in and out."""
    return f"--prompt-tokens={prompt}", f"--output-tokens={output}"


SEED = ("--requests=400", "--concurrency=40")
BURST = ("--requests=1000", "--request-rate=inf")
PACED = ("--requests=480", "--request-rate=16")
LONG = ("--requests=256", "--request-rate=inf")
LOADS = [
    Load("40 at once, 16..512 in, 128 out", (*SEED, *lengths("16:512", "128"))),
    Load("512 in, 128 out, all at once", (*BURST, *lengths("512", "128"))),
    Load("512 in, 128 out, 16 requests/s", (*PACED, *lengths("512", "128"))),
    Load("256 requests, 100..1024 in and out", (*LONG, *lengths("100:1024", "100:1024"))),
]
QUICK = [
    Load("4 at once", ("--requests=8", "--concurrency=4", *lengths("8:24", "8"))),
    Load("all at once", ("--requests=8", "--request-rate=inf", *lengths("16", "8"))),
]


def serving(place: Place) -> Iterator[Row]:
    """The stack under each load."""
    with served(place) as url:
        for load in loads(place):
            yield measured(url, load, rounds=1 if place.quick else 2)


def graphs(place: Place) -> list[Row]:
    """What graphs are worth through the stack at 40 concurrent requests, and at one."""
    chosen = loads(place)[0]
    alone = Load("1 at a time, 128 in, 128 out", ("--requests=20", "--concurrency=1", *lengths("128", "128")))
    found: dict[str, list[Row]] = {}
    for name, flags in (("graphs", ()), ("eager", ("--disable-cuda-graph",))):
        with served(place, *flags) as url:
            each = (chosen,) if place.quick else (chosen, alone)
            found[name] = [measured(url, load, rounds=1 if place.quick else 3) for load in each]
    return [
        {
            "load": with_graphs["load"],
            "graphs tokens/s": with_graphs["output tokens/s"],
            "eager tokens/s": eager["output tokens/s"],
            "graphs / eager": with_graphs["output tokens/s"] / eager["output tokens/s"],
        }
        for with_graphs, eager in zip(found["graphs"], found["eager"], strict=True)
    ]


def loads(place: Place) -> list[Load]:
    """The loads that are measured there."""
    return QUICK if place.quick else LOADS


@contextlib.contextmanager
def served(place: Place, *more: str) -> Iterator[str]:
    """The stack's address. On a GPU with settings for throughput, which the report names."""
    flags = [f"--model={place.model}", "--load-format=dummy", f"--device={place.device.type}", *more]
    flags += QUICK_FLAGS if place.quick else GPU_FLAGS
    with stack(*flags) as running:
        yield running.url


GPU_FLAGS = (
    "--max-context-length=2304",
    "--max-step-tokens=8192",
    "--max-batch-size=256",
    "--mem-fraction=0.8",
    "--gateways=4",
)
LOAD_SECONDS = 400
QUICK_FLAGS = ("--max-context-length=256", "--max-running-tokens=4096")


def measured(url: str, load: Load, rounds: int) -> Row:
    """One load's figures: medians of rounds. RuntimeError when requests failed."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "figures.json"
        command = [sys.executable, "-m", "sfllm_cli", "bench", f"--url={url}", f"--json={path}"]
        command += ["--ignore-eos", "--warmup=4", f"--rounds={rounds}", *load.flags]
        # Whatever else runs on the machine is measured with it: rounds are not repeated.
        command += ["--max-disturbance=1000", "--quiet-seconds=0"]
        process = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)
        if process.returncode or not path.exists():
            raise RuntimeError(f"sfllm bench ended with {process.returncode}: {process.stderr[-2000:]}")
        [result] = json.loads(path.read_text())["results"]
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} requests failed: {result['errors']}")
    return {
        "load": load.title,
        "requests/s": result["requests_per_second"],
        "output tokens/s": result["output_tokens_per_second"],
        "TTFT p50 ms": result["ttft"]["p50"] * 1e3,
        "TTFT p95 ms": result["ttft"]["p95"] * 1e3,
        "ms per token p50": result["tpot"]["p50"] * 1e3,
        "ms per token mean": result["tpot"]["mean"] * 1e3,
    }
