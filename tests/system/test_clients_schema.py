"""schemathesis asks a running sfllm whatever its OpenAPI document allows, and much that it does not."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from client_scripts import Clients
from running_stack import RunningStack

pytestmark = [pytest.mark.system, pytest.mark.timeout(420)]

CONFIGURATION = Path(__file__).parents[1] / "clients" / "schemathesis.toml"
KEY = "key-of-schemathesis"
EXAMPLES = 12
"""At random for each operation, after one for each bound of each field."""
RUN_SECONDS = 360
ANSWERED = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/generate")


VOCABULARY = range(512)
LARGE = 2**63 - 1
EXTREMES: dict[str, list[Any]] = {
    "prompt": ["x", [1, 2, 3], [[1], [2]], ["a", "b"], "\0", [0] * 255, "\U0010ffff"],
    "temperature": [0, 1e-5, 5e-324, 2],
    "top_p": [5e-324, 1e-8, 1],
    "top_k": [-1, 0, 1, 511, 512, LARGE, 10**30],
    "min_p": [0, 1, 5e-324],
    "frequency_penalty": [-2, 2, 5e-324],
    "presence_penalty": [-2, 2],
    "repetition_penalty": [1e-6, 1e6, 5e-324],
    "logit_bias": [{"5": 100, "6": -100}, {str(token): -100 for token in VOCABULARY}, {}],
    "allowed_token_ids": [[0], [511], [*VOCABULARY], [5, 5, 5]],
    "bad_words": [["a"], ["\0"], ["x" * 100], [" "]],
    "seed": [0, -LARGE, LARGE],
    "stop": ["a", ["\0"], ["\ud7ff"]],
    "stop_token_ids": [[0], [*VOCABULARY], []],
    "max_tokens": [1, 3, LARGE, 10**30, 256],
    "min_tokens": [0, 1, 3, 300, 2**40],
    "ignore_eos": [True],
    "n": [1, 2, 16, 128],
    "logprobs": [0, 1, 20],
    "prompt_logprobs": [0, 20],
    "echo": [True],
    "priority": [-(2**31), 2**31 - 1],
    "truncate_prompt_tokens": [-1, 0, 1, 2**40],
    "cache_salt": ["", "\0", "x" * 5000],
    "stream": [True],
    "structured_outputs": [
        {"choice": ["a", "b"]},
        {"choice": ["\0"]},
        {"regex": "[ab]{3}"},
        {"regex": ""},
        {"json": {"type": "integer"}},
        {"json": {"$ref": "#"}},
        {"grammar": 'start: "a"+'},
    ],
}
COMBINATIONS = 300


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    """A model with made-up weights, so that thousands of answers take seconds."""
    running = RunningStack(
        *("--model=tiny-llama", "--load-format=dummy", "--dtype=float32"),
        *("--max-context-length=256", f"--api-key={KEY}"),
    )
    try:
        running.wait_until_ready()
        yield Clients(running.url, KEY, "tiny-llama", tmp_path_factory.mktemp("schemathesis"))
    finally:
        code = running.stop()
    assert code == 0


def statuses(report: Path) -> dict[str, Counter[int]]:
    """How often each operation answered with each status."""
    found: dict[str, Counter[int]] = defaultdict(Counter)
    for line in report.read_text().splitlines():
        recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder") or {}
        for interaction in recorder.get("interactions", {}).values():
            if interaction["response"]:
                found[recorder["label"]][interaction["response"]["status_code"]] += 1
    return found


def test_no_answer_is_a_server_error_or_other_than_the_document_says(tiny: Clients) -> None:
    report = tiny.home / "report.ndjson"
    tiny.command(
        "schemathesis",
        "st",
        *("--config-file", str(CONFIGURATION), "run", f"{tiny.url}/openapi.json"),
        *("--header", f"Authorization: Bearer {KEY}", "--seed", "1", "--max-examples", str(EXAMPLES)),
        *("--phases", "examples,coverage,fuzzing", "--request-timeout", "60"),
        *("--continue-on-failure", "--no-shrink", "--report-ndjson-path", str(report)),
        seconds=RUN_SECONDS,
    )
    found = statuses(report)
    assert len(found) >= 20
    for path in ANSWERED:
        assert found[f"POST {path}"][200] > 0, "no body was right: nothing behind the checks was tried"
        assert found[f"POST {path}"][400] > 100


def test_no_combination_of_extreme_fields_is_a_server_error(tiny: Clients) -> None:
    rng = random.Random(1)
    found = Counter[int]()
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {KEY}"
        for _ in range(COMBINATIONS):
            names = rng.sample(list(EXTREMES), rng.randint(1, 7))
            extremes = {name: rng.choice(EXTREMES[name]) for name in names}
            body = {"prompt": "hello there", "max_tokens": 4, **extremes}
            if body.get("n", 1) > 2:
                body["max_tokens"] = 2
            answer = session.post(f"{tiny.url}/v1/completions", json=body, timeout=60)
            found[answer.status_code] += 1
            assert answer.status_code in {200, 400}, f"{answer.text}\n{json.dumps(body)}"
            assert answer.status_code == 400 or '"error"' not in answer.text, json.dumps(body)
    assert found[200] > COMBINATIONS / 2
