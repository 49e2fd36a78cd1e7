"""The deployed rules, alerts and dashboards, as tests read them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Rule(NamedTuple):
    """A rule: what it is called, its expression, and the whole of it."""

    name: str
    expression: str
    body: dict[str, Any]


def rules(kind: str) -> Iterator[Rule]:
    """All rules of a kind, `alert` or `record`."""
    for path in sorted((PROMETHEUS / "rules").glob("*.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                if kind in rule:
                    yield Rule(rule[kind], rule["expr"], rule)


class Alert(NamedTuple):
    """An alert as far as tests tell them apart; `job` is empty where it is about none."""

    name: str
    job: str = ""


def faster(duration: str, factor: int) -> str:
    """A duration as Prometheus writes it (`5m`), divided, in milliseconds."""
    return f"{int(duration[:-1]) * UNITS[duration[-1]] * 1000 // factor}ms"


def faster_rules(directory: Path, factor: int) -> Path:
    """A copy of all rules in which time runs faster: what they wait for and look back to is divided."""
    directory.mkdir()
    for path in (PROMETHEUS / "rules").glob("*.yaml"):
        text = re.sub(
            r"((?:for|keep_firing_for): |\[|offset )(\d+[smhd])\b",
            lambda match: match[1] + faster(match[2], factor),
            path.read_text(),
        )
        (directory / path.name).write_text(text)
    return directory


def dashboards() -> dict[str, dict[str, Any]]:
    """Every dashboard by the name of its file."""
    folder = ROOT / "deploy" / "grafana" / "dashboards"
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


class Query(NamedTuple):
    """What a panel asks."""

    panel: str
    expression: str


def queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    """Every expression of a dashboard, with its variables as they are when all is chosen."""
    for annotation in dashboard["annotations"]["list"]:
        yield Query(annotation["name"], _filled(annotation["expr"]))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield Query(panel["title"], _filled(target["expr"]))


def _filled(expression: str) -> str:
    return re.sub(
        r"\$(namespace|model|worker|instance)\b", ".*", expression.replace("$__rate_interval", "20s")
    )


class Selector(NamedTuple):
    """A metric that an expression reads, and the labels by which it does."""

    metric: str
    labels: frozenset[str]


def selectors(expression: str) -> set[Selector]:
    """The metrics of sfllm, and Prometheus' own `up`, that an expression reads."""
    code = re.sub(r"^\s*#.*$", "", expression, flags=re.MULTILINE)
    found = re.findall(r"\b((?:sfllm|model|namespace):[\w:]+|up\b)(?:\{([^}]*)\})?", code)
    return {Selector(name, frozenset(re.findall(r"(\w+)\s*[=!]", labels))) for name, labels in found}
