"""The settings of the commands: the document made from them, and what `serve` hands to each service."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from sfllm.config import Settings, parse
from sfllm.settings import GatewaySettings, SchedulerSettings, WorkerSettings
from sfllm_cli.main import main
from sfllm_cli.serve_plan import child_environment, child_specs, local_url
from sfllm_cli.settings import AllServeSettings, ServicesSettings, known_settings, split
from sfllm_cli.settings_docs import render

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def settings(*flags: str, **variables: str) -> ServicesSettings:
    return split(parse(AllServeSettings, prog="serve", description="", argv=flags, environ=variables))


def test_the_configuration_document_is_current() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(), "run: make docs"


@pytest.mark.parametrize("command", ["serve", "chat", "batch", "bench", "simulate", "pull"])
def test_help_names_every_setting_with_its_variable(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert out.count("SFLLM_") >= out.count("\n  --") - 1


def test_serve_takes_every_flag_of_every_service() -> None:
    for cls in (GatewaySettings, SchedulerSettings, WorkerSettings):
        assert set(cls.__struct_fields__) <= set(AllServeSettings.__struct_fields__)


def test_the_commands_are_listed_and_a_misspelt_one_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "sfllm COMMAND" in capsys.readouterr().out
    assert main(["serv"]) == 2
    assert "did you mean `sfllm serve`?" in capsys.readouterr().err
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("sfllm 0.")


def test_flag_variable_and_file_mean_the_same(tmp_path: Path) -> None:
    file = tmp_path / "sfllm.yaml"
    file.write_text("workers: 2\nport: 9000\n")
    from_file = settings("--config", str(file))
    assert (from_file.serve.workers, from_file.gateway.port) == (2, 9000)
    assert settings(SFLLM_WORKERS="2", SFLLM_PORT="9000") == from_file
    assert settings("--workers=2", "--port=9000") == from_file
    assert settings("--config", str(file), "--port=1", SFLLM_PORT="2").gateway.port == 1


@pytest.mark.parametrize("key", ["max-queue-requests", "max_queue_requests"])
def test_a_key_may_be_written_with_dashes_or_underscores(key: str, tmp_path: Path) -> None:
    file = tmp_path / "sfllm.yaml"
    file.write_text(f"{key}: 256\n")
    assert settings("--config", str(file)).scheduler.max_queue_requests == 256


def test_a_misspelt_key_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sfllm.yaml"
    file.write_text("max-que-requests: 256\n")
    with pytest.raises(SystemExit):
        settings("--config", str(file))
    assert "unknown settings max-que-requests" in capsys.readouterr().err


def test_a_file_for_serve_may_hold_settings_of_the_other_commands(tmp_path: Path) -> None:
    file = tmp_path / "sfllm.yaml"
    file.write_text("workers: 2\nconcurrency: 9\n")
    arguments = ["--config", str(file)]
    parsed = parse(AllServeSettings, prog="serve", description="", argv=arguments, known=known_settings())
    assert parsed.workers == 2


def test_each_process_gets_the_settings_it_shares_and_private_addresses(tmp_path: Path) -> None:
    given = settings("--port=9000", "--workers=2", "--gateways=2", "--dtype=float32", "--policy=fcfs")
    specs = {spec.name: spec for spec in child_specs(given, tmp_path, {}, cores=8)}
    assert list(specs) == ["scheduler", "gateway-0", "gateway-1", "worker-0", "worker-1"]
    gateway, worker, scheduler = (specs[name].command for name in ("gateway-1", "worker-1", "scheduler"))
    assert gateway[:3] == (sys.executable, "-m", "sfllm_gateway")
    assert "--port=9000" in gateway
    assert "--dtype=float32" in worker
    assert "--policy=fcfs" in scheduler
    assert f"--worker-address=ipc://{tmp_path}/worker" in worker
    assert f"--worker-address=ipc://{tmp_path}/worker" in scheduler
    for command, cls in (
        (gateway, GatewaySettings),
        (worker, WorkerSettings),
        (scheduler, SchedulerSettings),
    ):
        parse(cls, prog="", description="", argv=command[3:], environ={})


def test_each_of_several_schedulers_has_its_own_addresses_and_others_have_all(tmp_path: Path) -> None:
    given = settings("--schedulers=2", "--workers=2", "--admin-port=9100")
    specs = {spec.name: spec for spec in child_specs(given, tmp_path, {}, cores=8)}
    assert list(specs) == ["scheduler-0", "scheduler-1", "gateway-0", "worker-0", "worker-1"]
    for link in ("gateway", "worker", "asset"):
        one, other = (f"ipc://{tmp_path}/{link}-{index}" for index in range(2))
        assert f"--{link}-address={one}" in specs["scheduler-0"].command
        assert f"--{link}-address={other}" in specs["scheduler-1"].command
        for name, links in (("gateway-0", ("gateway", "asset")), ("worker-1", ("worker", "asset"))):
            if link in links:
                assert f"--{link}-address={one},{other}" in specs[name].command
    ports = [next(part for part in spec.command if "--admin-port" in part) for spec in specs.values()]
    assert ports == [f"--admin-port={port}" for port in range(9100, 9105)]


@pytest.mark.parametrize(
    ("cls", "flags", "message"),
    [
        (
            GatewaySettings,
            ["--gateway-address=tcp://a:1,tcp://b:1", "--asset-address=tcp://a:2"],
            "--gateway-address has 2 and --asset-address has 1: each scheduler needs an address in both",
        ),
        (
            WorkerSettings,
            ["--asset-address=tcp://a:1,tcp://b:1"],
            "--worker-address has 1 and --asset-address has 2: each scheduler needs an address in both",
        ),
        (
            WorkerSettings,
            ["--worker-address=tcp://a:1,tcp://a:1", "--asset-address=tcp://a:1,tcp://b:1"],
            "--worker-address: a scheduler is named twice",
        ),
        (GatewaySettings, ["--gateway-address=", "--asset-address="], "length >= 1"),
        (AllServeSettings, ["--schedulers=2", "--worker-address=tcp://a:1"], "has 1 for --schedulers 2"),
    ],
)
def test_addresses_that_do_not_fit_together_are_refused(
    cls: type[Settings], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(cls, prog="", description="", argv=flags, environ={})
    assert message in capsys.readouterr().err


def test_several_addresses_mean_the_same_from_flags_variables_and_files(tmp_path: Path) -> None:
    both = ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")
    file = tmp_path / "sfllm.yaml"
    listed = "[tcp://127.0.0.1:1, tcp://127.0.0.1:2]"
    file.write_text(f"worker-address: {listed}\nasset_address: {listed}\n")
    variables = {"SFLLM_WORKER_ADDRESS": ",".join(both), "SFLLM_ASSET_ADDRESS": ",".join(both)}
    flags = [f"--worker-address={','.join(both)}", "--asset-address", *both]
    for argv, environ in ((flags, {}), ([], variables), (["--config", str(file)], {})):
        found = parse(WorkerSettings, prog="", description="", argv=argv, environ=environ)
        assert (found.worker_address, found.asset_address) == (both, both)


def test_processes_stop_gateways_first_and_the_scheduler_last(tmp_path: Path) -> None:
    specs = child_specs(settings(), tmp_path, {}, cores=2)
    ranked = [spec.name for spec in sorted(specs, key=lambda spec: spec.stop_rank)]
    assert ranked == ["gateway-0", "worker-0", "scheduler"]


def test_several_workers_divide_the_cores_unless_told_otherwise(tmp_path: Path) -> None:
    def threads(*flags: str) -> list[str]:
        specs = child_specs(settings(*flags), tmp_path, {}, cores=8)
        return [part for part in specs[-1].command if part.startswith("--threads")]

    assert threads() == []
    assert threads("--workers=3") == ["--threads=2"]
    assert threads("--workers=20") == ["--threads=1"]
    assert threads("--workers=3", "--threads=7") == ["--threads=7"]


def test_admin_ports_follow_one_another(tmp_path: Path) -> None:
    specs = child_specs(settings("--admin-port=9100", "--workers=2"), tmp_path, {}, cores=2)
    ports = [next(part for part in spec.command if part.startswith("--admin-port")) for spec in specs]
    assert ports == [f"--admin-port={port}" for port in (9100, 9101, 9102, 9103)]


def test_a_variable_cannot_override_a_flag_in_a_service() -> None:
    environment = child_environment({"SFLLM_PORT": "1", "SFLLM_CACHE_DIR": "/c", "PATH": "/bin"})
    assert "SFLLM_PORT" not in environment
    assert (environment["SFLLM_CACHE_DIR"], environment["PATH"]) == ("/c", "/bin")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:1"),
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://[::1]:1"),
        ("example", "http://example:1"),
    ],
)
def test_the_printed_address_is_one_that_this_machine_reaches(host: str, url: str) -> None:
    assert local_url(host, 1) == url


def test_a_port_that_is_taken_is_told_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port), "--load-format", "dummy"]) == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_told_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "./nowhere", "--port", "0"]) == 1
    assert "no model at './nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [(["--host=0.0.0.0"], "--allow-anonymous"), (["--tls-cert-file=cert.pem"], "need each other")],
)
def test_what_a_service_would_refuse_is_wrong_usage_of_serve(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--mock", *flags])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
