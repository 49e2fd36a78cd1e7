"""With `--metrics-prefix vllm:` vLLM's own Grafana dashboards show data, asked through a real Prometheus."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from observability import ROOT
from real_prometheus import Prometheus, prometheus
from running_stack import RunningStack
from vllm_queries import QUERIES, UNANSWERED, VllmQuery, unanswered

pytestmark = pytest.mark.system

CLIENTS = 4
LOAD_SECONDS = 90.0
"""At most: the load ends when every expression has an answer that can have one."""

MODEL = "mock"


@pytest.fixture(scope="module")
def unanswered_at_last(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[str]]:
    """The expressions that had no answer from a Prometheus that scraped busy services for a while."""
    if shutil.which("prometheus") is None:
        pytest.skip("NO DASHBOARD WAS TESTED: there is no Prometheus (Debian: apt install prometheus)")
    stack = RunningStack("--mock", "--metrics-prefix=vllm:", "--mock-tokens-per-second=200")
    try:
        stack.wait_until_ready()
        yield _ask_under_load(stack, tmp_path_factory.mktemp("vllm"))
    finally:
        code = stack.stop()
    assert code == 0


def _ask_under_load(stack: RunningStack, directory: Path) -> set[str]:
    urls = [stack.url, stack.scheduler_admin, *stack.worker_admins]
    targets = {"vllm": [url.removeprefix("http://") for url in urls]}
    stopping = threading.Event()
    with (
        ThreadPoolExecutor(CLIENTS) as clients,
        prometheus(directory, targets, deployed="prometheus-vllm.yaml") as server,
    ):
        asking = [clients.submit(_client, stack.url, number, stopping) for number in range(CLIENTS)]
        try:
            left = _left_when_all_had_time(server)
        finally:
            stopping.set()
        for client in asking:
            client.result()
    return left


def _client(url: str, number: int, stopping: threading.Event) -> None:
    body = {"prompt": "Tell me " * (1 + 5 * number), "max_tokens": 20 + number, "n": 1 + number % 2}
    while not stopping.is_set():
        request = urllib.request.Request(
            f"{url}/v1/completions",
            data=json.dumps(body | {"ignore_eos": True}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()


def _left_when_all_had_time(server: Prometheus) -> set[str]:
    left = {query.expression for query in QUERIES}
    hopeless = {expression for expression in left if unanswered(expression)}
    deadline = time.monotonic() + LOAD_SECONDS
    while left - hopeless and time.monotonic() < deadline:
        left = {expression for expression in left if not server.has_data(_filled(server, expression))}
    return left


def _filled(server: Prometheus, expression: str) -> str:
    """The expression as Grafana asks it when all that its variables offer is chosen."""
    offered = server.get("series", **{"match[]": "vllm:num_requests_running"})
    for label in ("job", "instance", "model_name"):
        expression = expression.replace(f"${label}", "|".join(sorted({each[label] for each in offered})))
    for variable, value in {
        "$Deployment_id": MODEL,
        "$ttft_slo": "1.0",
        "$tpot_slo": "0.1",
        "$__rate_interval": "20s",
        "$__range": "60s",
    }.items():
        expression = expression.replace(variable, value)
    return expression


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.dashboard}: {query.expression}")
def test_a_panel_of_vllm_shows_data_or_is_known_not_to(
    unanswered_at_last: set[str], query: VllmQuery
) -> None:
    assert (query.expression in unanswered_at_last) == (unanswered(query.expression) is not None)


def test_the_documentation_names_what_stays_empty_and_why() -> None:
    migration = (ROOT / "docs" / "migration.md").read_text()
    rows = [line for line in migration.splitlines() if line.startswith("|")]
    for part, reason in UNANSWERED.items():
        name = part.removeprefix("vllm:")
        assert any(name in row and reason in row for row in rows), name
