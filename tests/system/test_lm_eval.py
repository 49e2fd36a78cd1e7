"""EleutherAI's lm-eval gets the same results through the HTTP API as from transformers in its own process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from running_stack import RunningStack

from sfllm_worker.load.gguf_cache import converted

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]

TASK_DIRECTORY = Path(__file__).parent / "lm_eval_task"
TASKS = ("sfllm_choice", "sfllm_continuation", "sfllm_document", "sfllm_generation")
RUN_SECONDS = 600
TOLERANCE = 1e-3
"""Of a log likelihood summed over a continuation or document; in float32 about 2e-5 is seen."""
SERVED_NAME = "smollm2"
EXACT_METRICS = {"acc", "acc_norm", "exact_match"}


@dataclass(frozen=True)
class Evaluation:
    """What one run of lm-eval wrote: by task its metrics, by task and document number its answers."""

    metrics: dict[str, dict[str, float]]
    samples: dict[tuple[str, int], dict[str, Any]]

    def likelihoods(self) -> dict[tuple[str, int, int], tuple[float, bool | None]]:
        """Summed log likelihood, and whether it is the greedy text (None for documents)."""
        found: dict[tuple[str, int, int], tuple[float, bool | None]] = {}
        for (task, document), sample in self.samples.items():
            if task == "sfllm_generation":
                continue
            for number, (answer,) in enumerate(sample["resps"]):
                value, greedy = (answer, None) if isinstance(answer, str) else answer
                found[task, document, number] = (
                    float(value),
                    None if greedy is None else {"True": True, "False": False}[greedy],
                )
        return found

    def texts(self) -> dict[int, str]:
        return {
            document: sample["resps"][0][0]
            for (task, document), sample in self.samples.items()
            if task == "sfllm_generation"
        }


def evaluate(directory: Path, model: str, arguments: dict[str, object], batch_size: int = 1) -> Evaluation:
    """Run the command as a user does, without the network, and read what it wrote to `directory`."""
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", model, "--batch_size", str(batch_size)),
        *("--model_args", *(f"{name}={value}" for name, value in arguments.items())),
        *("--tasks", *TASKS, "--include_path", str(TASK_DIRECTORY), "--device", "cpu"),
        *("--log_samples", "--output_path", str(directory / "results")),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "cache")}
    finished = subprocess.run(
        command,
        cwd=TASK_DIRECTORY,  # the tasks name their data relative to it
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert finished.returncode == 0, f"lm-eval failed:\n{finished.stderr[-6000:]}"
    return read_evaluation(directory / "results")


def read_evaluation(directory: Path) -> Evaluation:
    (results,) = directory.rglob("results_*.json")
    metrics = {
        task: {
            name.removesuffix(",none"): value
            for name, value in values.items()
            if name.endswith(",none") and "_stderr" not in name
        }
        for task, values in json.loads(results.read_text())["results"].items()
    }
    samples = {}
    for task in TASKS:
        (file,) = directory.rglob(f"samples_{task}_*.jsonl")
        for line in file.read_text().splitlines():
            sample = json.loads(line)
            samples[task, int(sample["doc_id"])] = sample
    return Evaluation(metrics, samples)


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf: Path) -> Iterator[Path]:
    """The default model as a Hugging Face directory in float32, which both sides read."""
    with tempfile.TemporaryDirectory(prefix="sfllm-test-") as cache:
        yield converted(smollm2_gguf, torch.float32, Path(cache))


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The results of lm-eval's own `hf` backend, after a check that they can tell right from wrong."""
    found = evaluate(tmp_path_factory.mktemp("hf"), "hf", {"pretrained": checkpoint, "dtype": "float32"})
    assert {greedy for _, greedy in found.likelihoods().values()} == {True, False, None}
    for values in found.metrics.values():
        for name in EXACT_METRICS & values.keys():
            assert 0 < values[name] < 1
    return found


@pytest.fixture(scope="module")
def stack(checkpoint: Path) -> Iterator[RunningStack]:
    running = RunningStack(
        f"--model={checkpoint}",
        f"--served-model-name={SERVED_NAME}",
        "--dtype=float32",
        "--max-context-length=2048",
    )
    try:
        running.wait_until_ready()
        yield running
    finally:
        code = running.stop()
    assert code == 0


def through_the_api(
    stack: RunningStack, directory: Path, batch_size: int = 1, **arguments: object
) -> Evaluation:
    url = f"{stack.url}/v1/completions"
    named = {"model": SERVED_NAME, "base_url": url, "max_retries": 1, **arguments}
    return evaluate(directory, "local-completions", named, batch_size)


def check_same(found: Evaluation, expected: Evaluation) -> None:
    assert found.samples.keys() == expected.samples.keys()
    seen, wanted = found.likelihoods(), expected.likelihoods()
    assert seen.keys() == wanted.keys()
    wrong = {
        key: (seen[key], wanted[key])
        for key in wanted
        if not math.isclose(seen[key][0], wanted[key][0], rel_tol=0, abs_tol=TOLERANCE)
        or seen[key][1] != wanted[key][1]
    }
    assert not wrong
    assert found.texts() == expected.texts()
    assert found.metrics.keys() == expected.metrics.keys()
    for task, values in expected.metrics.items():
        for name, value in values.items():
            allowed = value if name in EXACT_METRICS else pytest.approx(value, rel=1e-4)
            assert found.metrics[task][name] == allowed, (task, name)


def test_prompts_sent_as_token_ids_score_as_in_transformers(
    stack: RunningStack, checkpoint: Path, expected: Evaluation, tmp_path: Path
) -> None:
    check_same(through_the_api(stack, tmp_path, tokenizer=checkpoint), expected)


def test_prompts_sent_as_text_by_several_connections_score_as_in_transformers(
    stack: RunningStack, checkpoint: Path, expected: Evaluation, tmp_path: Path
) -> None:
    found = through_the_api(stack, tmp_path, tokenizer=checkpoint, tokenized_requests=False, num_concurrent=4)
    check_same(found, expected)


def test_batches_of_prompts_tokenized_by_the_server_score_as_in_transformers(
    stack: RunningStack, expected: Evaluation, tmp_path: Path
) -> None:
    found = through_the_api(stack, tmp_path, batch_size=4, tokenizer_backend="remote", num_concurrent=2)
    check_same(found, expected)
