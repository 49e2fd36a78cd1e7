"""Dashboards as an operator uses them: choices that work, units, names, nothing that covers another panel."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest
from observability import dashboards

DASHBOARDS = dashboards()
BUILT_IN = {"__rate_interval", "datasource"}
DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@pytest.fixture(params=DASHBOARDS, ids=str)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    return DASHBOARDS[request.param]


def panels(dashboard: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if not kinds or panel["type"] in kinds]


def test_what_can_be_chosen_is_what_the_panels_ask_with(dashboard: dict[str, Any]) -> None:
    offered = {variable["name"] for variable in dashboard["templating"]["list"]} - {"datasource"}
    asked = {
        name
        for panel in panels(dashboard)
        for target in panel.get("targets", ())
        for name in re.findall(r"\$\{?(\w+)", target["expr"])
    }
    assert asked - BUILT_IN == offered


def test_every_query_goes_to_the_data_source_that_was_chosen(dashboard: dict[str, Any]) -> None:
    kinds = [variable["type"] for variable in dashboard["templating"]["list"]]
    assert kinds[0] == "datasource"
    sources = [panel["datasource"] for panel in panels(dashboard) if panel["type"] != "row"]
    sources += [target["datasource"] for panel in panels(dashboard) for target in panel.get("targets", ())]
    sources += [each["datasource"] for each in dashboard["annotations"]["list"]]
    sources += [each["datasource"] for each in dashboard["templating"]["list"][1:]]
    assert all(source == DATA_SOURCE for source in sources)


def test_values_have_units_and_lines_have_names(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard, "timeseries", "stat", "heatmap"):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        several = [target for target in panel["targets"] if " by (" in target["expr"]]
        assert all(target["legendFormat"] for target in several), panel["title"]
        assert len({target["legendFormat"] for target in panel["targets"]}) == len(panel["targets"])


def test_no_panel_covers_another_or_has_its_id(dashboard: dict[str, Any]) -> None:
    assert len({panel["id"] for panel in panels(dashboard)}) == len(panels(dashboard))
    for one, other in combinations((panel["gridPos"] for panel in panels(dashboard)), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
        assert one["x"] + one["w"] <= 24


def test_dashboards_lead_to_each_other_and_keep_what_was_chosen(dashboard: dict[str, Any]) -> None:
    (link,) = dashboard["links"]
    assert (link["type"], link["includeVars"], link["keepTime"]) == ("dashboards", True, True)
    assert set(link["tags"]) <= set(dashboard["tags"])


@pytest.mark.parametrize(
    ("name", "title", "worst"),
    [
        ("sfllm-users", "First token, p95", 2.5),
        ("sfllm-users", "Pause between tokens, p95", 0.2),
        ("sfllm-users", "Errors of the server", 0.05),
        ("sfllm-engine", "Fullest KV cache", 0.95),
    ],
)
def test_a_value_turns_red_where_its_alert_begins(name: str, title: str, worst: float) -> None:
    (panel,) = [panel for panel in panels(DASHBOARDS[name]) if panel["title"] == title]
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert (steps[-1]["color"], steps[-1]["value"]) == ("red", worst)
