"""Who may do what in the chart: rights of pods, keys of links and of clients, the network between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from chart import EXAMPLES, OPEN, Object, container, find, helm, matches, pods, render, variables, volumes

from sfllm.link_keys import ClientRole, kubernetes_secret, make_link_keys, read_client_keys

pytestmark = pytest.mark.system


@pytest.fixture(params=EXAMPLES)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(EXAMPLES[request.param])


def test_pods_have_no_rights_that_they_do_not_need(objects: list[Object]) -> None:
    account = find(objects, "ServiceAccount", "llm-sfllm")
    assert account["automountServiceAccountToken"] is False
    for pod in pods(objects).values():
        spec, only = pod["spec"], container(pod)
        assert spec["serviceAccountName"] == "llm-sfllm"
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(volumes(pod)) == {mount["name"] for mount in only["volumeMounts"]}
        assert only["resources"]["requests"]


def test_an_account_that_is_there_can_be_used() -> None:
    objects = render({"serviceAccount": {"create": False, "name": "serving"}})
    assert not [each for each in objects if each["kind"] == "ServiceAccount"]
    assert {pod["spec"]["serviceAccountName"] for pod in pods(objects).values()} == {"serving"}


def test_images_are_pulled_with_the_secrets_that_are_given() -> None:
    for pod in pods(render(EXAMPLES["cpu"])).values():
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry-key"}]


def test_each_service_sees_its_own_key_of_the_links_and_no_other() -> None:
    for pod in pods(render({"links": {"secret": "keys"}})).values():
        service = container(pod)["name"]
        assert volumes(pod)["links"]["secret"] == {
            "secretName": "keys",
            "defaultMode": 0o440,
            "items": [{"key": f"{service}.keys", "path": "link.keys"}],
        }
        (mount,) = [each for each in container(pod)["volumeMounts"] if each["name"] == "links"]
        assert mount["readOnly"] is True
        assert "subPath" not in mount  # or a changed secret would not be seen
        assert variables(pod)["SFLLM_LINK_KEYS"] == f"{mount['mountPath']}/link.keys"
        assert "SFLLM_INSECURE_LINKS" not in variables(pod)


def test_the_secret_that_the_command_prints_has_what_pods_mount(tmp_path: Path) -> None:
    make_link_keys(tmp_path)
    secret = yaml.safe_load(kubernetes_secret(tmp_path, "sfllm-links"))
    mounted = [volumes(pod)["links"]["secret"] for pod in pods(render({})).values()]
    assert {each["secretName"] for each in mounted} == {secret["metadata"]["name"]}
    assert {each["items"][0]["key"] for each in mounted} == set(secret["stringData"])
    # As the kubelet writes it: the group of the pod may read it, and nobody else.
    roles: tuple[ClientRole, ...] = ("gateway", "worker")
    for role in roles:
        file = tmp_path / f"{role}.keys"
        file.write_text(secret["stringData"][file.name])
        file.chmod(mounted[0]["defaultMode"])
        assert read_client_keys(file, role).scheduler


def test_gateways_alone_see_the_hashes_of_the_api_keys() -> None:
    for pod in pods(render({"gateway": {"apiKeysSecret": "clients"}})).values():
        secrets = {each["secret"]["secretName"] for each in pod["spec"]["volumes"] if "secret" in each}
        if container(pod)["name"] != "gateway":
            assert secrets == {"sfllm-links"}
            continue
        assert secrets == {"sfllm-links", "clients"}
        assert variables(pod)["SFLLM_API_KEY_FILE"] == "/run/sfllm/api-keys/keys.txt"
        assert "SFLLM_ALLOW_ANONYMOUS" not in variables(pod)


def test_a_release_without_keys_says_so_to_its_services() -> None:
    for pod in pods(render(OPEN)).values():
        assert "links" not in volumes(pod)
        assert "api-keys" not in volumes(pod)
        assert variables(pod)["SFLLM_INSECURE_LINKS"] == "1"
        assert "SFLLM_LINK_KEYS" not in variables(pod)
        anonymous = variables(pod).get("SFLLM_ALLOW_ANONYMOUS")
        assert anonymous == ("1" if container(pod)["name"] == "gateway" else None)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"links": {"secret": ""}}, "sfllm keys links DIR --kubernetes NAME"),
        ({"gateway": {"apiKeysSecret": ""}}, "sfllm keys add NAME keys.txt"),
    ],
)
def test_a_release_that_names_no_keys_is_refused_and_told_how_to_make_them(
    values: dict[str, Any], told: str
) -> None:
    with pytest.raises(helm.HelmRenderError, match=told):
        render(values)


def component(peer: Object) -> str:
    return str(peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"])


def test_only_gateways_and_workers_reach_the_scheduler() -> None:
    objects = render({})
    policy = find(objects, "NetworkPolicy", "llm-sfllm-scheduler")["spec"]
    reached = {
        port["port"]: {component(peer) for peer in rule.get("from", [])}
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


def calls(values: dict[str, Any], service: str) -> dict[tuple[int, ...], Any]:
    """Whom pods of a service may call: the peers by the ports, None for everybody."""
    egress = find(render(values), "NetworkPolicy", f"llm-sfllm-{service}")["spec"]["egress"]
    return {tuple(sorted({port["port"] for port in rule["ports"]})): rule.get("to") for rule in egress}


def test_what_leaves_a_pod_goes_where_it_has_to() -> None:
    assert calls({}, "gateway").keys() == {(53,), (5557, 5559)}
    assert calls({}, "worker").keys() == {(53,), (5558, 5559), (443,)}
    for service, links in (("gateway", (5557, 5559)), ("worker", (5558, 5559))):
        assert [component(peer) for peer in calls({}, service)[links]] == ["scheduler"]


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("http://collector.monitoring:4318", 4318),
        ("https://otlp.example.com", 443),
        ("http://[fd00::1]:4319/x", 4319),
        ("http://collector/v1", 80),
    ],
)
def test_traces_may_leave_every_service(endpoint: str, port: int) -> None:
    for service in ("gateway", "scheduler", "worker"):
        assert (port,) in calls({"tracing": {"endpoint": endpoint}}, service)
        assert (53,) in calls({"tracing": {"endpoint": endpoint}}, service)


def test_peers_are_those_that_the_values_name() -> None:
    gpus, cpu = EXAMPLES["gpus"], EXAMPLES["cpu"]
    assert (443,) not in calls(gpus, "worker")
    named = gpus["networkPolicy"]
    assert calls(gpus, "scheduler") == {(53,): named["dns"], (4318,): named["collector"]}
    assert calls(cpu, "worker")[(443,)] == cpu["networkPolicy"]["downloadsFrom"]
    rules = {
        rule["ports"][0]["port"]: rule["from"]
        for rule in find(render(gpus), "NetworkPolicy", "llm-sfllm-gateway")["spec"]["ingress"]
    }
    assert rules == {"admin": named["prometheus"], "http": named["clients"]}
