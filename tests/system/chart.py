"""Renders the Helm chart, and finds what a test looks for in what came out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

helm = pytest.importorskip(
    "helm_python", reason="NO CHART WAS TESTED: pip install -r tests/system/requirements.txt"
)

CHART = Path(__file__).parents[2] / "deploy" / "kubernetes" / "sfllm"
OPEN: dict[str, Any] = {"links": {"insecure": True}, "gateway": {"allowAnonymous": True}}
"""Values for a release that needs no secret."""

EXAMPLES: dict[str, dict[str, Any]] = {"defaults": {}} | {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((CHART / "examples").glob("*.yaml"))
}
Object = dict[str, Any]


def render(values: Mapping[str, Any], name: str = "llm", chart: Path = CHART) -> list[Object]:
    """The objects that an installation in the namespace `serving` would make."""
    with helm.Chart.load(str(chart)) as loaded:
        files = loaded.render(dict(values), name=name, namespace="serving")
    texts = (text for path, text in files.items() if path.endswith(".yaml"))
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


def find(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def pods(objects: list[Object]) -> dict[str, Object]:
    """The pod of each Deployment."""
    return {o["metadata"]["name"]: o["spec"]["template"] for o in objects if o["kind"] == "Deployment"}


def container(pod: Object) -> Object:
    (found,) = pod["spec"]["containers"]
    return dict(found)


def variables(pod: Object) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container(pod)["env"]}


def volumes(pod: Object) -> dict[str, Object]:
    return {each["name"]: each for each in pod["spec"]["volumes"]}


def matches(selector: Mapping[str, str], pod: Object) -> bool:
    return selector.items() <= pod["metadata"]["labels"].items()
