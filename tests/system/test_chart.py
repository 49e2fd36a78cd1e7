"""The Helm chart renders to what Kubernetes accepts, for several values, and says what the services need."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from sfllm.settings import GatewaySettings, SchedulerSettings, WorkerSettings

helm = pytest.importorskip(
    "helm_python", reason="NO CHART WAS TESTED: pip install -r tests/system/requirements.txt"
)
kubernetes_validate = pytest.importorskip("kubernetes_validate")

pytestmark = pytest.mark.system

CHART = Path(__file__).parents[2] / "deploy" / "kubernetes" / "sfllm"
OLDEST, NEWEST = "1.28", "1.37"
WITHOUT_SCHEMA = {"ScaledObject", "ServiceMonitor"}
"""They belong to KEDA and to the Prometheus operator, not to Kubernetes."""

EXAMPLES: dict[str, dict[str, Any]] = {"defaults": {}} | {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((CHART / "examples").glob("*.yaml"))
}
Object = dict[str, Any]


def render(values: Mapping[str, Any], name: str = "llm") -> list[Object]:
    with helm.Chart.load(str(CHART)) as chart:
        files = chart.render(dict(values), name=name, namespace="serving")
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


@pytest.fixture(params=EXAMPLES)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(EXAMPLES[request.param])


def test_the_linter_finds_nothing() -> None:
    result = helm.lint(str(CHART), strict=True)
    assert [m for m in result["messages"] if "icon" not in str(m)] == [], result


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_accepts_every_object(objects: list[Object], version: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names))
    for each in objects:
        if each["kind"] not in WITHOUT_SCHEMA:
            kubernetes_validate.validate(each, version, strict=True)


def test_pods_have_no_rights_that_they_do_not_need(objects: list[Object]) -> None:
    for pod in pods(objects).values():
        spec, only = pod["spec"], container(pod)
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounted = {mount["name"] for mount in only["volumeMounts"]}
        assert {volume["name"] for volume in spec["volumes"]} == mounted
        assert only["resources"]["requests"]


def test_kubernetes_own_variables_do_not_become_settings(objects: list[Object]) -> None:
    """A service named sfllm would set SFLLM_PORT to an address."""
    assert all(pod["spec"]["enableServiceLinks"] is False for pod in pods(objects).values())


def test_every_variable_is_a_setting_of_its_service(objects: list[Object]) -> None:
    settings = {"gateway": GatewaySettings, "scheduler": SchedulerSettings, "worker": WorkerSettings}
    no_settings = {"SFLLM_CACHE_DIR"}
    for pod in pods(objects).values():
        known = settings[container(pod)["name"]].__struct_fields__
        for name in variables(pod):
            if name.startswith("SFLLM_") and name not in no_settings:
                assert name.removeprefix("SFLLM_").lower() in known, name


def test_probes_and_services_lead_to_ports_that_containers_have(objects: list[Object]) -> None:
    for pod in pods(objects).values():
        only = container(pod)
        ports = {port["name"]: port["containerPort"] for port in only["ports"]}
        assert ports["admin"] == 9090
        assert only["livenessProbe"]["httpGet"] == {"path": "/health", "port": "admin"}
        assert only["readinessProbe"]["httpGet"]["path"] == "/ready"
        assert only["readinessProbe"]["httpGet"]["port"] in ports
    for service in (each for each in objects if each["kind"] == "Service"):
        chosen = [pod for pod in pods(objects).values() if matches(service["spec"]["selector"], pod)]
        assert chosen
        for pod in chosen:
            named = {port["name"] for port in container(pod)["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= named


def matches(selector: Mapping[str, str], pod: Object) -> bool:
    return selector.items() <= pod["metadata"]["labels"].items()


def test_addresses_name_the_schedulers_service(objects: list[Object]) -> None:
    scheduler = find(objects, "Service", "llm-sfllm-scheduler")
    ports = {port["name"]: port["port"] for port in scheduler["spec"]["ports"]}
    wanted = {
        "SFLLM_GATEWAY_ADDRESS": "gateways",
        "SFLLM_WORKER_ADDRESS": "workers",
        "SFLLM_ASSET_ADDRESS": "assets",
    }
    seen = set()
    for pod in pods(objects).values():
        for name, value in variables(pod).items():
            if name in wanted:
                assert value == f"tcp://llm-sfllm-scheduler:{ports[wanted[name]]}"
                seen.add(name)
    assert seen == set(wanted)


def test_a_pod_is_given_longer_to_stop_than_its_drain_takes(objects: list[Object]) -> None:
    for pod in pods(objects).values():
        grace = pod["spec"]["terminationGracePeriodSeconds"]
        drain = int(variables(pod).get("SFLLM_DRAIN_SECONDS", 0))
        pause = container(pod).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["", 0])
        assert grace >= drain + int(pause[1]) + 5
        if container(pod)["name"] != "scheduler":
            assert drain > 0


def test_a_deployment_of_which_there_may_be_several_has_a_disruption_budget(
    objects: list[Object],
) -> None:
    budgets = [each for each in objects if each["kind"] == "PodDisruptionBudget"]
    for name, pod in pods(objects).items():
        chosen = [b for b in budgets if matches(b["spec"]["selector"]["matchLabels"], pod)]
        assert len(chosen) == (0 if name.endswith("-scheduler") else 1)


def test_two_models_are_two_deployments_with_gpus_of_their_own() -> None:
    found = pods(render(EXAMPLES["gpus"]))
    assert set(found) == {
        *("llm-sfllm-gateway", "llm-sfllm-scheduler"),
        *("llm-sfllm-worker-qwen3-06b", "llm-sfllm-worker-llama-8b"),
    }
    qwen, llama = found["llm-sfllm-worker-qwen3-06b"], found["llm-sfllm-worker-llama-8b"]
    for pod in (qwen, llama):
        assert container(pod)["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert variables(pod)["SFLLM_DEVICE"] == "cuda"
        assert variables(pod)["HF_TOKEN"] == ""  # from the secret
    assert container(qwen)["resources"]["limits"] == {"memory": "32Gi", "nvidia.com/gpu": 1}
    assert variables(qwen)["SFLLM_MODEL"] == "Qwen/Qwen3-0.6B"
    assert container(qwen)["args"] == ["--served-model-name", "qwen3-0.6b", "default"]
    assert variables(llama)["SFLLM_MAX_CONTEXT_LENGTH"] == "16384"
    assert "SFLLM_MAX_CONTEXT_LENGTH" not in variables(qwen)


def test_one_service_or_model_can_run_another_version_than_the_rest() -> None:
    values = copy.deepcopy(EXAMPLES["gpus"]) | {"gateway": {"tag": "2.0"}}
    values["models"][0]["tag"] = "3.0"
    images = {name: container(pod)["image"] for name, pod in pods(render(values)).items()}
    assert images == {
        "llm-sfllm-gateway": "registry.example.com/llm/sfllm-gateway:2.0",
        "llm-sfllm-scheduler": "registry.example.com/llm/sfllm-scheduler:0.1.0",
        "llm-sfllm-worker-qwen3-06b": "registry.example.com/llm/sfllm-worker:3.0",
        "llm-sfllm-worker-llama-8b": "registry.example.com/llm/sfllm-worker:0.1.0",
    }


def test_what_is_scaled_has_no_number_of_its_own() -> None:
    objects = render(EXAMPLES["gpus"])
    kinds = {("ScaledObject", "llm-sfllm-worker-qwen3-06b"), ("HorizontalPodAutoscaler", "llm-sfllm-gateway")}
    for kind, name in kinds:
        scaled = find(objects, kind, name)["spec"]["scaleTargetRef"]["name"]
        assert "replicas" not in find(objects, "Deployment", scaled)["spec"]
    assert find(objects, "Deployment", "llm-sfllm-worker-llama-8b")["spec"]["replicas"] == 2


def test_workers_are_scaled_by_queue_and_kv_cache_of_their_model() -> None:
    scaled = find(render(EXAMPLES["gpus"]), "ScaledObject", "llm-sfllm-worker-qwen3-06b")["spec"]
    match = '{namespace="serving", model_name="qwen3-0.6b"}'
    assert [trigger["metadata"]["query"] for trigger in scaled["triggers"]] == [
        f"sum(sfllm:num_requests_running{match}) + sum(sfllm:num_requests_waiting{match})",
        f"avg(sfllm:kv_cache_usage_perc{match})",
    ]
    assert [trigger["metricType"] for trigger in scaled["triggers"]] == ["AverageValue", "Value"]
    assert [trigger["metadata"]["threshold"] for trigger in scaled["triggers"]] == ["64", "0.8"]


def test_the_monitor_names_jobs_as_the_rules_do() -> None:
    objects = render(EXAMPLES["gpus"])
    monitor = find(objects, "ServiceMonitor", "llm-sfllm-metrics")
    service = find(objects, "Service", "llm-sfllm-metrics")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert endpoint["relabelings"][0]["targetLabel"] == "job"
    assert len([pod for pod in pods(objects).values() if matches(service["spec"]["selector"], pod)]) == 4


def test_only_gateways_and_workers_reach_the_scheduler() -> None:
    objects = render({})
    policy = find(objects, "NetworkPolicy", "llm-sfllm-scheduler")["spec"]
    reached = {
        port["port"]: {rule_peer(peer) for peer in rule.get("from", [])}
        for rule in policy["ingress"]
        for port in rule["ports"]
        if port["port"] in {"gateways", "workers"}
    }
    assert reached == {"gateways": {"gateway"}, "workers": {"worker"}}
    assert policy["egress"] == []
    for name, pod in pods(objects).items():
        selecting = [o for o in objects if o["kind"] == "NetworkPolicy"]
        assert len([o for o in selecting if matches(o["spec"]["podSelector"]["matchLabels"], pod)]) == 1, name
    assert not [o for o in render(EXAMPLES["try"]) if o["kind"] == "NetworkPolicy"]


def rule_peer(peer: Object) -> str:
    return str(peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"])


def test_all_that_needs_something_installed_first_is_off_by_default() -> None:
    kinds = {each["kind"] for each in render({})}
    assert kinds == {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("a misspelt setting", {"gateway": {"replica": 3}}),
    ("no model", {"models": []}),
    ("a model without names", {"models": [{"name": "m", "model": "m"}]}),
    ("a name that is no label", {"models": [{"name": "Qwen/Qwen3", "model": "m", "servedNames": ["m"]}]}),
    ("a share above one", {"worker": {"autoscaling": {"kvCacheUsage": 80}}}),
    ("no drain", {"worker": {"drainSeconds": 0}}),
    ("a registry without its slash", {"image": {"registry": "registry.example.com"}}),
    ("a variable in small letters", {"worker": {"env": {"sfllm-threads": "2"}}}),
]


@pytest.mark.parametrize("values", [values for _, values in WRONG], ids=[name for name, _ in WRONG])
def test_values_that_cannot_work_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmValuesError):
        render(copy.deepcopy(values))
