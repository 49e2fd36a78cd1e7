"""What the chart brings for Prometheus and autoscalers: monitors, rules, metrics that workers scale by."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from chart import CHART, EXAMPLES, find, helm, matches, pods, render

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
RULES = {path.stem: path for path in (ROOT / "deploy" / "prometheus" / "rules").glob("*.yaml")}
ADAPTER = yaml.safe_load((CHART.parent / "prometheus-adapter.yaml").read_text())
EVERYTHING = EXAMPLES["gpus"]


def test_what_is_scaled_has_no_number_of_its_own() -> None:
    objects = render(EVERYTHING)
    kinds = {("ScaledObject", "llm-sfllm-worker-qwen3-06b"), ("HorizontalPodAutoscaler", "llm-sfllm-gateway")}
    for kind, name in kinds:
        scaled = find(objects, kind, name)["spec"]["scaleTargetRef"]["name"]
        assert "replicas" not in find(objects, "Deployment", scaled)["spec"]
    assert find(objects, "Deployment", "llm-sfllm-worker-llama-8b")["spec"]["replicas"] == 2


def test_keda_scales_workers_by_queue_and_kv_cache_of_their_model() -> None:
    scaled = find(render(EVERYTHING), "ScaledObject", "llm-sfllm-worker-qwen3-06b")["spec"]
    match = '{namespace="serving", model_name="qwen3-0.6b"}'
    assert [trigger["metadata"]["query"] for trigger in scaled["triggers"]] == [
        f"sum(sfllm:num_requests_running{match}) + sum(sfllm:num_requests_waiting{match})",
        f"avg(sfllm:kv_cache_usage_perc{match})",
    ]
    assert [trigger["metricType"] for trigger in scaled["triggers"]] == ["AverageValue", "Value"]
    assert [trigger["metadata"]["threshold"] for trigger in scaled["triggers"]] == ["64", "0.8"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="NO QUERY WAS ASKED: there is no promtool")
def test_the_queries_of_keda_count_what_is_of_their_model_and_namespace(tmp_path: Path) -> None:
    scaled = find(render(EVERYTHING), "ScaledObject", "llm-sfllm-worker-qwen3-06b")["spec"]
    own = 'namespace="serving", model_name="qwen3-0.6b"'
    series = {
        f"sfllm:num_requests_running{{{own}}}": 40,
        f"sfllm:num_requests_waiting{{{own}}}": 7,
        f'sfllm:kv_cache_usage_perc{{{own}, worker="a"}}': 0.9,
        f'sfllm:kv_cache_usage_perc{{{own}, worker="b"}}': 0.5,
        'sfllm:num_requests_running{namespace="serving", model_name="llama-3.1-8b"}': 1000,
        'sfllm:kv_cache_usage_perc{namespace="other", model_name="qwen3-0.6b"}': 1,
    }
    queries = [trigger["metadata"]["query"] for trigger in scaled["triggers"]]
    scenario = {
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": name, "values": str(value)} for name, value in series.items()],
                "promql_expr_test": [
                    {"expr": query, "eval_time": "0s", "exp_samples": [{"labels": "{}", "value": value}]}
                    for query, value in zip(queries, (47, 0.7), strict=True)
                ],
            }
        ]
    }
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump(scenario))
    command = ["promtool", "test", "rules", str(file)]
    told = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stdout + told.stderr


def test_without_keda_the_cluster_scales_by_the_metrics_that_the_adapter_makes() -> None:
    objects = render(EXAMPLES["adapter"])
    assert not [each for each in objects if each["kind"] == "ScaledObject"]
    scaled = find(objects, "HorizontalPodAutoscaler", "llm-sfllm-worker-qwen3-06b")["spec"]
    metrics = {each["external"]["metric"]["name"]: each["external"] for each in scaled["metrics"]}
    assert set(metrics) == {rule["name"]["as"] for rule in ADAPTER["rules"]["external"]}
    assert {name: each["target"] for name, each in metrics.items()} == {
        "sfllm_requests": {"type": "AverageValue", "averageValue": "48"},
        "sfllm_kv_cache_usage": {"type": "Value", "value": "750m"},
    }
    for each in metrics.values():
        assert each["metric"]["selector"] == {"matchLabels": {"model_name": "qwen3-0.6b"}}
    assert scaled["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 300


def test_keda_and_the_adapter_ask_the_same_and_for_metrics_that_there_are() -> None:
    scaled = find(render(EVERYTHING), "ScaledObject", "llm-sfllm-worker-qwen3-06b")["spec"]
    keda = {re.sub(r"{.*?}", "{}", trigger["metadata"]["query"]) for trigger in scaled["triggers"]}
    rules = ADAPTER["rules"]["external"]
    assert keda == {rule["metricsQuery"].replace("<<.LabelMatchers>>", "") for rule in rules}
    reference = (ROOT / "docs" / "api-reference.md").read_text()
    for name in re.findall(r"sfllm:(\w+)", str(ADAPTER)):
        assert f"| `{name}` | gauge |" in reference


def test_the_monitor_names_jobs_as_the_rules_do() -> None:
    objects = render(EVERYTHING)
    monitor = find(objects, "ServiceMonitor", "llm-sfllm-metrics")
    service = find(objects, "Service", "llm-sfllm-metrics")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert endpoint["relabelings"][0]["targetLabel"] == "job"
    assert len([pod for pod in pods(objects).values() if matches(service["spec"]["selector"], pod)]) == 4


@pytest.mark.parametrize("packaged", [False, True])
def test_the_rules_are_those_of_deploy_prometheus(tmp_path: Path, packaged: bool) -> None:
    """The chart has them by a link, which a package holds as files."""
    chart = Path(helm.package(str(CHART), destination=str(tmp_path))) if packaged else CHART
    objects = [each for each in render(EVERYTHING, chart=chart) if each["kind"] == "PrometheusRule"]
    assert {each["metadata"]["name"]: each["spec"] for each in objects} == {
        f"llm-sfllm-{name}": yaml.safe_load(path.read_text()) for name, path in RULES.items()
    }
    assert {each["metadata"]["labels"]["release"] for each in objects} == {"prometheus"}
