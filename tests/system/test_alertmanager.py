"""Real services break, a real Prometheus notices, and a real Alertmanager tells whom it should, once each."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from chaos.ask import ask
from chaos.fleet import Fleet, eventually
from chaos.http_client import Address
from chaos.layout import FleetOptions
from observability import Alert, faster_rules, rules
from real_alertmanager import CONFIGURATION, PROGRAM, Alertmanager, Notice, Webhook, alertmanager
from real_prometheus import prometheus
from short_streams import completion

FACTOR = 60
"""Times that rules and Alertmanager are in more of a hurry than deployed: minutes are seconds."""

PAUSE_SECONDS = 0.3
"""Between requests."""

OPTIONS = FleetOptions(
    workers=2,
    relays=False,
    worker={"mock_tokens_per_second": 200.0},
    # Soon enough that there are errors to tell of while no scheduler is there.
    gateway={"connect_wait_seconds": 1.0},
)
INHIBITED_WITHOUT_SCHEDULER = {Alert("SfllmTargetDown", "sfllm-scheduler"), Alert("SfllmGatewayErrors")}
ALERTS = {rule.name: rule for rule in rules("alert")}


class Told(NamedTuple):
    """What came to the webhook in the end, and what had come and was inhibited without a scheduler."""

    notices: list[Notice]
    before_scheduler_was_back: list[Notice]
    inhibited: set[Alert]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    if not (shutil.which("prometheus") and shutil.which(PROGRAM)):
        pytest.skip(
            "NO ALERT WAS SENT: there is no Prometheus or no Alertmanager (Debian: prometheus-alertmanager)"
        )
    directory = tmp_path_factory.mktemp("alerts")
    webhook = Webhook()
    try:
        with alertmanager(directory, webhook.address, FACTOR) as manager:
            yield asyncio.run(_break_things(directory, manager, webhook))
    finally:
        webhook.close()


async def _break_things(directory: Path, manager: Alertmanager, webhook: Webhook) -> Told:
    """Kill a worker; then let there be no scheduler until it was told, and again one."""
    fleet = Fleet(OPTIONS, directory / "fleet")
    targets = {
        f"sfllm-{kind}": [f"{service.admin.host}:{service.admin.port}" for service in fleet.of_kind(kind)]
        for kind in ("gateway", "scheduler", "worker")
    }

    async def heard(name: str, status: str) -> None:
        await asyncio.to_thread(webhook.wait_for, name, status, lambda: str(manager.alerts()))

    async def inhibits() -> bool:
        return await asyncio.to_thread(manager.inhibited) >= INHIBITED_WITHOUT_SCHEDULER

    async with fleet:
        faster = faster_rules(directory / "rules", FACTOR)
        with prometheus(directory, targets, faster, manager.address) as server:
            # What is counted before it was first looked at is no increase to Prometheus.
            scraped = f"count(up == 1) == {len(fleet.services)}"
            assert await eventually(lambda: asyncio.to_thread(server.has_data, scraped), 60)
            stopping = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                try:
                    group.create_task(_clients(group, fleet.urls["gateway-0"], stopping))
                    assert fleet.of_kind("worker")[0].kill()
                    await heard("SfllmWorkerLost", "firing")
                    await heard("SfllmWorkerLost", "resolved")
                    await fleet.scheduler.stop(30)
                    await heard("SfllmNoScheduler", "firing")
                    if not await eventually(inhibits, 60):
                        raise AssertionError(f"inhibited: {manager.inhibited()}; all: {manager.alerts()}")
                    inhibited, before = manager.inhibited(), webhook.notices()
                    fleet.scheduler.start()
                    await heard("SfllmNoScheduler", "resolved")
                finally:
                    stopping.set()
    return Told(webhook.notices(), before, inhibited)


async def _clients(group: asyncio.TaskGroup, address: Address, stopping: asyncio.Event) -> None:
    """Requests that come whether or not those before have been answered."""
    while not stopping.is_set():
        group.create_task(ask(address, completion("a client", max_tokens=40)))
        await asyncio.sleep(PAUSE_SECONDS)


@pytest.mark.system
@pytest.mark.parametrize(
    ("alert", "path"),
    [("SfllmWorkerLost", "/ticket"), ("SfllmNoScheduler", "/page")],
    ids=lambda value: value,
)
def test_an_alert_reaches_its_receiver_with_its_runbook_and_is_taken_back(
    told: Told, alert: str, path: str
) -> None:
    notices = [notice for notice in told.notices if notice.alert.name == alert]
    assert {notice.status for notice in notices} == {"firing", "resolved"}
    for notice in notices:
        assert notice.path == path
        assert notice.annotations["runbook_url"] == f"docs/operations.md#{alert.lower()}"
        assert notice.annotations["summary"]
    assert [notice.status for notice in notices][-1] == "resolved"


@pytest.mark.system
def test_the_cause_of_a_lost_worker_is_told(told: Told) -> None:
    lost = next(notice for notice in told.notices if notice.alert.name == "SfllmWorkerLost")
    assert lost.labels["cause"] == "unreachable"


@pytest.mark.system
def test_what_follows_from_a_missing_scheduler_is_not_told_beside_it(told: Told) -> None:
    assert told.inhibited >= INHIBITED_WITHOUT_SCHEDULER
    assert not {notice.alert for notice in told.before_scheduler_was_back} & told.inhibited


@pytest.fixture
def amtool() -> str:
    found = shutil.which("amtool")
    if found is None:
        pytest.skip("NO ROUTE WAS TESTED: there is no amtool (Debian: apt install prometheus-alertmanager)")
    return found


def run(*command: str) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout.strip()


@pytest.mark.system
def test_amtool_accepts_the_configuration(amtool: str) -> None:
    run(amtool, "check-config", str(CONFIGURATION))


@pytest.mark.system
@pytest.mark.parametrize("severity", ["page", "ticket"])
def test_amtool_routes_an_alert_by_its_severity(amtool: str, severity: str) -> None:
    options = ("config", "routes", "test", f"--config.file={CONFIGURATION}")
    assert run(amtool, *options, f"severity={severity}", "alertname=SfllmNoWorkers") == severity


def _inhibitions() -> list[tuple[str, set[str], dict[str, Any]]]:
    """Of each rule the alert that inhibits, and those that it does."""
    found = []
    for rule in yaml.safe_load(CONFIGURATION.read_text())["inhibit_rules"]:
        (source,) = (matcher.split(" = ")[1] for matcher in rule["source_matchers"])
        pattern = next(m for m in rule["target_matchers"] if m.startswith("alertname"))
        names = re.split(r" =~? ", pattern)[1].strip('"').split("|")
        inhibited = {alert for alert in ALERTS for name in names if re.fullmatch(name, alert)}
        assert all(any(re.fullmatch(name, alert) for alert in ALERTS) for name in names), names
        found.append((source, inhibited, rule))
    return found


def test_inhibitions_are_of_alerts_that_exist_and_none_inhibits_what_inhibits_it() -> None:
    edges = {(source, target) for source, targets, _ in _inhibitions() for target in targets}
    assert {source for source, _ in edges} <= set(ALERTS)
    assert not {(target, source) for source, target in edges} & edges


def test_only_what_lasts_as_long_as_its_targets_inhibits_across_models() -> None:
    """Rates look back five minutes: when the cause ends first, they would be told of as something new."""
    for source, targets, _ in _inhibitions():
        window = re.search(r"\[(15m)\]", ALERTS[source].expression)
        if any("Errors" in target or "Fail" in target for target in targets):
            assert window or ALERTS[source].body.get("keep_firing_for") == "6m", source


def test_a_rule_of_inhibition_stays_within_a_namespace() -> None:
    assert all("namespace" in rule["equal"] for _, _, rule in _inhibitions())
