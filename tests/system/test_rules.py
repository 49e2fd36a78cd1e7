"""promtool accepts configuration and rules, every alert fires when it should, and each has a runbook."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from observability import PROMETHEUS, ROOT, rules

RUNBOOK = ROOT / "docs" / "operations.md"
ALERTS = sorted(rule.name for rule in rules("alert"))


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("NO RULE WAS TESTED: there is no promtool (Debian: apt install prometheus)")
    return found


def check(*command: str | Path) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.system
def test_promtool_accepts_the_configuration_and_its_rules(promtool: str) -> None:
    check(promtool, "check", "config", PROMETHEUS / "prometheus.yaml")
    check(promtool, "check", "config", PROMETHEUS / "prometheus-vllm.yaml")


@pytest.mark.system
def test_promtool_accepts_the_configuration_for_kubernetes(promtool: str, tmp_path: Path) -> None:
    """Debian's build cannot discover Kubernetes, so that one key is checked without it."""
    configuration = yaml.safe_load((PROMETHEUS / "prometheus-kubernetes.yaml").read_text())
    (job,) = configuration["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    configuration["rule_files"] = [str(PROMETHEUS / file) for file in configuration["rule_files"]]
    written = tmp_path / "prometheus.yaml"
    written.write_text(yaml.safe_dump(configuration))
    check(promtool, "check", "config", written)


@pytest.mark.system
@pytest.mark.parametrize("name", [path.name for path in sorted((PROMETHEUS / "tests").glob("*.yaml"))])
def test_alerts_fire_when_they_should_and_only_then(promtool: str, name: str) -> None:
    check(promtool, "test", "rules", PROMETHEUS / "tests" / name)


def test_every_alert_fires_in_a_scenario() -> None:
    scenarios = "".join(path.read_text() for path in (PROMETHEUS / "tests").glob("*.yaml"))
    fired = set(re.findall(r'labels: .*alertname="(\w+)"', scenarios))
    assert fired == set(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_says_how_bad_it_is_and_leads_to_its_page_of_the_runbook(alert: str) -> None:
    (rule,) = [rule for rule in rules("alert") if rule.name == alert]
    assert rule.body["labels"]["severity"] in {"page", "ticket"}
    path, _, anchor = rule.body["annotations"]["runbook_url"].partition("#")
    assert ROOT / path == RUNBOOK
    assert anchor in _anchors()
    assert anchor == alert.lower()
    section = RUNBOOK.read_text().partition(f"### {alert}\n")[2].partition("\n#")[0]
    for part in ("**Means**", "**Users**", "**Likely**", "**Look at**", "**Do**"):
        assert part in section, f"{alert}: the runbook does not say {part}"


def test_the_runbook_has_no_page_of_an_alert_that_is_gone() -> None:
    assert sorted(re.findall(r"^### (Sfllm\w+)$", RUNBOOK.read_text(), re.MULTILINE)) == ALERTS


def _anchors() -> set[str]:
    """The anchors of the runbook, by the rules of the project's own checker of links."""
    spec = importlib.util.spec_from_file_location("check_links", ROOT / "tests" / "tools" / "check_links.py")
    assert spec is not None
    assert spec.loader is not None
    check_links = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_links)
    found: set[str] = check_links.anchors(RUNBOOK.read_text())
    return found
