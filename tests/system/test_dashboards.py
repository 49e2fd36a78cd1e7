"""Every query of dashboards and rules has an answer from a real Prometheus that scrapes busy services."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import zmq
from chaos.ask import ask
from chaos.fleet import Fleet, eventually
from chaos.http_client import Address, BrokenConnectionError, Connection
from chaos.layout import FleetOptions
from chaos.metrics import read
from gpu_worker import GpuWorker, gpu_worker
from observability import Query, Selector, dashboards, queries, rules, selectors
from real_prometheus import Prometheus, prometheus
from short_streams import completion

pytestmark = pytest.mark.system

CLIENTS = 14
LOAD_SECONDS = 90.0
"""At most: the load ends when every query has an answer."""

COUNTED = "sfllm:worker_losses_total and on () sfllm:malformed_messages_total"
DESERVED = {"SfllmWorkerLost", "SfllmMalformedMessages"}
"""Alerts about what the test does to the services."""

OPTIONS = FleetOptions(
    workers=2,
    gateways=2,
    relays=False,
    # Few at once, so that there is a queue, and a short one, so that it is full at times.
    worker={"max_batch_size": 3, "mock_tokens_per_second": 100.0},
    scheduler={"max_queue_requests": 6},
)


class Seen(NamedTuple):
    """What a Prometheus knew at the end of the load, and all metrics that the services name."""

    empty: set[str]
    labels: dict[str, set[str]]
    named: set[str]
    firing: set[str]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    if shutil.which("prometheus") is None:
        pytest.skip("NO DASHBOARD WAS TESTED: there is no Prometheus (Debian: apt install prometheus)")
    return asyncio.run(_observe(tmp_path_factory.mktemp("dashboards")))


async def _observe(directory: Path) -> Seen:
    fleet = Fleet(OPTIONS, directory / "fleet")
    targets = {
        f"sfllm-{kind}": [f"{service.admin.host}:{service.admin.port}" for service in fleet.of_kind(kind)]
        for kind in ("gateway", "scheduler", "worker")
    }
    async with fleet:
        with gpu_worker() as made_up, prometheus(directory, _with(targets, made_up)) as server:
            stopping = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                group.create_task(_work(made_up, stopping))
                for number in range(CLIENTS):
                    address = fleet.urls[f"gateway-{number % 2}"]
                    group.create_task(_client(address, number, stopping))
                try:
                    # What is counted before it was first looked at is no increase to Prometheus.
                    assert await eventually(lambda: asyncio.to_thread(server.has_data, COUNTED), 60)
                    await _misfortune(fleet)
                    empty = await _unanswered(server)
                finally:
                    stopping.set()
            metrics = {s.metric for _, expression in _everything() for s in selectors(expression)}
            labels = {metric: server.labels(metric) for metric in metrics}
            alerts = server.get("alerts")["alerts"]
        pages = [await read(service.admin) for service in fleet.services]
    named = {name for page in pages for name in _names(page)}
    firing = {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}
    return Seen(empty, labels, named, firing)


def _with(targets: dict[str, list[str]], worker: GpuWorker) -> dict[str, list[str]]:
    """Mock workers have neither a GPU nor a model to load: what belongs to those comes from this one."""
    return {**targets, "sfllm-worker": [*targets["sfllm-worker"], f"127.0.0.1:{worker.port}"]}


async def _work(worker: GpuWorker, stopping: asyncio.Event) -> None:
    while not stopping.is_set():
        worker.work()
        await asyncio.sleep(0.5)


def _everything() -> list[tuple[str, str]]:
    """Where each expression stands, and the expression."""
    panels = [(name, query.expression) for name, board in dashboards().items() for query in queries(board)]
    recorded = [(rule.name, rule.expression) for rule in rules("record")]
    return panels + recorded + [(rule.name, rule.expression) for rule in rules("alert")]


async def _client(address: Address, number: int, stopping: asyncio.Event) -> None:
    """Ask without end for completions of many kinds; every seventh client leaves before its answer."""
    template = completion(
        f"client {number}", prompt="word " * (1 + 7 * number), n=1 + number % 2, max_tokens=40
    )
    while not stopping.is_set():
        delivery = await ask(address, template, leave_after=0.2 if number % 7 == 0 else None)
        if delivery.ended not in {"complete", "left"}:
            await asyncio.sleep(0.2)  # the queue is full


async def _misfortune(fleet: Fleet) -> None:
    """What is counted only when it happens: a lost worker, a missed deadline, a frame that is no message."""
    worker = fleet.of_kind("worker")[0]
    assert worker.kill()
    assert await worker.ended(0, 30)
    address = fleet.urls["gateway-0"]
    for _ in range(3):
        await _impatient(address)
    argument = next(part for part in fleet.scheduler.spec.command if part.startswith("--gateway-address="))
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 1000
        stranger.connect(argument.partition("=")[2])
        stranger.send(b"no message")


async def _impatient(address: Address) -> None:
    """A request whose deadline passes in the queue."""
    connection = await Connection.open(address)
    try:
        body = completion("impatient", max_tokens=500).body
        answer = await connection.request("POST", "/v1/completions", body, {"X-Request-Timeout": "0.05"})
        await answer.body()
    except BrokenConnectionError:
        pass  # a stream that had begun ends so
    finally:
        connection.close()


async def _unanswered(server: Prometheus) -> set[str]:
    """The expressions of panels, recording rules and deserved alerts that have no answer in time."""
    left = {expression for _, expression in _everything()} - {rule.expression for rule in rules("alert")}
    left |= {f'ALERTS{{alertname="{name}", alertstate="firing"}}' for name in DESERVED}
    deadline = time.monotonic() + LOAD_SECONDS
    while left and time.monotonic() < deadline:
        for expression in sorted(left):
            if await asyncio.to_thread(server.has_data, expression):
                left.discard(expression)
        await asyncio.sleep(1)
    return left


def _names(page: str) -> Iterator[str]:
    """Every series that a page of metrics can have, whether or not it has any yet."""
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE):
        yield name
        if kind == "histogram":
            yield from (f"{name}_bucket", f"{name}_sum", f"{name}_count")


@pytest.mark.parametrize(
    ("dashboard", "query"),
    [(name, query) for name, board in dashboards().items() for query in queries(board)],
)
def test_a_panel_shows_data(seen: Seen, dashboard: str, query: Query) -> None:
    assert query.expression not in seen.empty, f"{dashboard}: {query.panel}"


@pytest.mark.parametrize("rule", list(rules("record")), ids=lambda rule: rule.name)
def test_a_recording_rule_records_something(seen: Seen, rule: tuple[str, str, object]) -> None:
    assert rule[1] not in seen.empty
    assert seen.labels.get(rule[0], {"unread"})


@pytest.mark.parametrize(
    "selector",
    sorted({s for _, expression in _everything() for s in selectors(expression)}, key=str),
    ids=lambda selector: "-".join([selector.metric, *sorted(selector.labels)]),
)
def test_an_expression_reads_metrics_and_labels_that_exist(seen: Seen, selector: Selector) -> None:
    """Most alerts have no answer, as nothing is wrong; what they are made of must be there all the same."""
    labels = seen.labels[selector.metric]
    assert labels or selector.metric in seen.named, f"no service has {selector.metric}"
    if labels:
        assert selector.labels - {"namespace"} <= labels  # namespaces are Kubernetes'


def test_alerts_tell_what_has_happened_and_nothing_that_has_not(seen: Seen) -> None:
    assert seen.firing >= DESERVED
    quiet = {"SfllmWorkersCrashLoop", "SfllmNoWorkers", "SfllmRequestQuarantined", "SfllmGpuUnreadable"}
    assert not seen.firing & quiet


def test_every_metric_that_is_shown_or_watched_is_in_the_reference() -> None:
    reference = (Path(__file__).parents[2] / "docs" / "api-reference.md").read_text()
    named = set(re.findall(r"`(\w+)`", reference))
    metrics = {s.metric for _, expression in _everything() for s in selectors(expression)}
    ours = {metric.removeprefix("sfllm:") for metric in metrics if metric.startswith("sfllm:")}
    assert {name for name in ours if not {name, re.sub("_(bucket|sum|count)$", "", name)} & named} == set()
