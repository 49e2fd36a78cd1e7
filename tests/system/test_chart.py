"""The Helm chart renders to what Kubernetes accepts, for several values, and says what the services need."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from chart import CHART, EXAMPLES, Object, container, find, helm, matches, pods, render, variables, volumes

from sfllm.settings import GatewaySettings, SchedulerSettings, WorkerSettings

kubernetes_validate = pytest.importorskip("kubernetes_validate")

pytestmark = pytest.mark.system

OLDEST, NEWEST = "1.28", "1.37"
WITHOUT_SCHEMA = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}
"""They belong to KEDA and to the Prometheus operator, not to Kubernetes."""


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
    assert qwen["spec"]["priorityClassName"] == "serving"
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
        "llm-sfllm-worker-qwen3-06b": "registry.example.com/llm/sfllm-worker-cuda:3.0",
        "llm-sfllm-worker-llama-8b": "registry.example.com/llm/sfllm-worker-cuda:0.1.0",
    }


def test_pods_of_one_kind_are_spread_and_each_kind_by_itself() -> None:
    found = pods(render(EXAMPLES["gpus"]))
    for name, pod in found.items():
        spread = pod["spec"].get("topologySpreadConstraints", [])
        assert len(spread) == (0 if name.endswith("-scheduler") else 1)
        for each in spread:
            chosen = each["labelSelector"]["matchLabels"]
            assert [other for other in found.values() if matches(chosen, other)] == [pod]
    worker = pods(render(EXAMPLES["cpu"]))["llm-sfllm-worker-smollm2"]
    assert worker["spec"]["topologySpreadConstraints"][0]["topologyKey"] == "topology.kubernetes.io/zone"


def test_workers_are_replaced_as_there_is_room() -> None:
    strategies = {
        each["metadata"]["name"]: each["spec"]["strategy"]["rollingUpdate"]
        for example in ("adapter", "gpus")
        for each in render(EXAMPLES[example])
        if each["kind"] == "Deployment" and "-worker-" in each["metadata"]["name"]
    }
    first, last = {"maxSurge": 0, "maxUnavailable": 1}, {"maxSurge": 1, "maxUnavailable": 0}
    assert strategies["llm-sfllm-worker-llama-8b"] == first
    assert strategies["llm-sfllm-worker-smollm2"] == last
    gpu = find(render(EXAMPLES["adapter"]), "Deployment", "llm-sfllm-worker-qwen3-06b")["spec"]
    assert gpu["strategy"]["rollingUpdate"] == last  # there is a GPU to spare, the example says
    assert gpu["template"]["spec"]["runtimeClassName"] == "nvidia"


def test_traces_go_to_the_collector_from_every_service_and_the_gateway_chooses() -> None:
    for name, pod in pods(render(EXAMPLES["gpus"])).items():
        found = variables(pod)
        assert found["SFLLM_OTLP_ENDPOINT"] == "http://collector.monitoring:4318"
        assert found.get("SFLLM_TRACE_SAMPLE_RATE") == ("0.05" if name.endswith("-gateway") else None)
    headers = {"tracing": {"endpoint": "https://otlp.example.com", "headersSecret": "otlp"}}
    for pod in pods(render(headers)).values():
        (found,) = [each for each in container(pod)["env"] if each["name"] == "OTEL_EXPORTER_OTLP_HEADERS"]
        assert found["valueFrom"] == {"secretKeyRef": {"name": "otlp", "key": "headers"}}


def test_all_that_needs_something_installed_first_is_off_by_default() -> None:
    kinds = {each["kind"] for each in render({})}
    assert kinds == {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceAccount"}


def test_a_gateway_serves_https_by_a_secret_of_its_own() -> None:
    pod = pods(render(EXAMPLES["cpu"]))["llm-sfllm-gateway"]
    folder = next(each["mountPath"] for each in container(pod)["volumeMounts"] if each["name"] == "tls")
    assert volumes(pod)["tls"]["secret"]["secretName"] == "llm-tls"
    assert variables(pod)["SFLLM_TLS_CERT_FILE"] == f"{folder}/tls.crt"
    assert variables(pod)["SFLLM_TLS_KEY_FILE"] == f"{folder}/tls.key"
    assert container(pod)["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("a misspelt setting", {"gateway": {"replica": 3}}),
    ("no model", {"models": []}),
    ("a model without names", {"models": [{"name": "m", "model": "m"}]}),
    ("a name that is no label", {"models": [{"name": "Qwen/Qwen3", "model": "m", "servedNames": ["m"]}]}),
    ("a share above one", {"worker": {"autoscaling": {"kvCacheUsage": 80}}}),
    ("no drain", {"worker": {"drainSeconds": 0}}),
    ("a registry without its slash", {"image": {"registry": "registry.example.com"}}),
    ("an unknown way to scale", {"worker": {"autoscaling": {"by": "cron"}}}),
    ("a collector without a scheme", {"tracing": {"endpoint": "collector:4318"}}),
    ("a secret with a path", {"links": {"secret": "keys/links"}}),
    ("a peer that is everybody by mistake", {"networkPolicy": {"clients": [{}]}}),
    ("a variable in small letters", {"worker": {"env": {"sfllm-threads": "2"}}}),
]


@pytest.mark.parametrize("values", [values for _, values in WRONG], ids=[name for name, _ in WRONG])
def test_values_that_cannot_work_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmValuesError):
        render(copy.deepcopy(values))


def changed(before: list[Object], after: list[Object]) -> set[str]:
    """The services of which Kubernetes would make new pods."""
    old, new = pods(before), pods(after)
    return {container(new[name])["name"] for name in new if new[name] != old[name]}


def test_the_recipe_of_an_upgrade_replaces_one_service_after_the_other(tmp_path: Path) -> None:
    """With the newer chart from the first step on, as docs/deployment.md has it."""
    newer = Path(helm.package(str(CHART), destination=str(tmp_path), version="0.2.0", app_version="0.2.0"))
    steps: list[dict[str, Any]] = [
        {"image": {"tag": "0.1.0"}},
        {"image": {"tag": "0.1.0"}, "scheduler": {"tag": "0.2.0"}},
        {"image": {"tag": "0.1.0"}, "scheduler": {"tag": "0.2.0"}, "worker": {"tag": "0.2.0"}},
        {"image": {"tag": "0.2.0"}},
    ]
    installed = render({})
    for values, expected in zip(steps, (set(), {"scheduler"}, {"worker"}, {"gateway"}), strict=True):
        upgraded = render(values, chart=newer)
        assert changed(installed, upgraded) == expected
        installed = upgraded


def test_a_service_can_lead_to_the_gateways_of_another_release() -> None:
    other = render({}, name="next")
    service = find(render({"gateway": {"service": {"instance": "next"}}}), "Service", "llm-sfllm-gateway")
    (chosen,) = [pod for pod in pods(other).values() if matches(service["spec"]["selector"], pod)]
    assert container(chosen)["name"] == "gateway"


def test_workers_with_and_without_gpus_have_images_of_their_own() -> None:
    found = pods(render(EXAMPLES["adapter"]))
    images = [container(found[f"llm-sfllm-worker-{name}"])["image"] for name in ("qwen3-06b", "smollm2")]
    assert images == [f"registry.example.com/llm/sfllm-worker{kind}:0.1.0" for kind in ("-cuda", "")]
