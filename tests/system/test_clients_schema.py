"""schemathesis asks a running sfllm whatever its OpenAPI document allows, and much that it does not."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from client_scripts import Clients
from running_stack import RunningStack

pytestmark = [pytest.mark.system, pytest.mark.timeout(420)]

CONFIGURATION = Path(__file__).parents[1] / "clients" / "schemathesis.toml"
KEY = "key-of-schemathesis"
EXAMPLES = 12
"""At random for each operation, after one for each bound of each field."""
RUN_SECONDS = 360
ANSWERED = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/generate")


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Clients]:
    """A model with made-up weights, so that thousands of answers take seconds."""
    running = RunningStack(
        *("--model=tiny-llama", "--load-format=dummy", "--dtype=float32"),
        *("--max-context-length=256", f"--api-key={KEY}"),
    )
    try:
        running.wait_until_ready()
        yield Clients(running.url, KEY, "tiny-llama", tmp_path)
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
