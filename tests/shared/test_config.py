"""Settings: where a value comes from, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfllm.config import options, parse, to_arguments
from sfllm.settings import GatewaySettings, SchedulerSettings, WorkerSettings


def gateway(*argv: str, **environ: str) -> GatewaySettings:
    return parse(
        GatewaySettings,
        prog="gateway",
        description="test",
        argv=list(argv),
        environ=environ,
        known=[SchedulerSettings, WorkerSettings],
    )


def worker(*argv: str, **environ: str) -> WorkerSettings:
    return parse(WorkerSettings, prog="worker", description="test", argv=list(argv), environ=environ)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sfllm.yaml"
    path.write_text("port: 3\n", encoding="utf-8")
    return path


def test_a_flag_goes_before_the_environment_before_the_file_before_the_default(file: Path) -> None:
    config = f"--config={file}"
    assert gateway().port == 8081
    assert gateway(config).port == 3
    assert gateway(config, SFLLM_PORT="2").port == 2
    assert gateway(config, "--port=1", SFLLM_PORT="2").port == 1


def test_the_file_can_be_named_by_the_environment(file: Path) -> None:
    assert gateway(SFLLM_CONFIG=str(file)).port == 3


def test_a_shared_file_may_hold_settings_of_other_services(file: Path) -> None:
    file.write_text("port: 3\nmax-batch-size: 8\npolicy: fcfs\n", encoding="utf-8")
    assert gateway(f"--config={file}").port == 3


def test_an_unknown_key_in_the_file_is_refused_by_name(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("prot: 3\n", encoding="utf-8")
    with pytest.raises(SystemExit) as outcome:
        gateway(f"--config={file}")
    assert outcome.value.code == 2
    assert "unknown settings prot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--port=99999", ["--port", "65535"]),
        ("--port=abc", ["--port"]),
        ("--keep-alive-seconds=0", ["--keep-alive-seconds"]),
        ("--log-level=loud", ["--log-level", "loud", "warning"]),
        ("--no-such-flag", ["--no-such-flag"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    argument: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as outcome:
        gateway(argument)
    assert outcome.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    for word in words:
        assert word in message
    assert "Traceback" not in message


def test_the_older_name_of_the_model_variable_works_and_the_newer_wins() -> None:
    assert worker(SFLLM_MODEL_PATH="/models/a").model == "/models/a"
    assert worker(SFLLM_MODEL_PATH="/models/a", SFLLM_MODEL="/models/b").model == "/models/b"


def test_several_names_come_from_flags_the_environment_and_files(file: Path) -> None:
    assert worker("--served-model-name", "a", "b").served_model_name == ("a", "b")
    assert worker("--served-model-name=a,b").served_model_name == ("a", "b")
    assert worker(SFLLM_SERVED_MODEL_NAME="a,b").served_model_name == ("a", "b")
    file.write_text("served-model-name: [a, b]\n", encoding="utf-8")
    assert worker(f"--config={file}").served_model_name == ("a", "b")


def test_an_optional_number_stays_unset_until_it_is_given() -> None:
    assert worker().max_running_tokens is None
    assert worker("--max-running-tokens=4096").max_running_tokens == 4096


@pytest.mark.parametrize("settings", [GatewaySettings, SchedulerSettings, WorkerSettings])
def test_help_shows_every_setting_with_its_variable(
    settings: type[GatewaySettings], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as outcome:
        parse(settings, prog="x", description="test", argv=["--help"], environ={})
    assert outcome.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in options(settings):
        assert option.flag in text
        assert f"SFLLM_{option.name.upper()}" in text
        assert option.help


def test_a_command_line_can_be_made_from_settings_and_read_back() -> None:
    given = worker("--served-model-name=a,b", "--threads=2", "--mem-fraction=0.25", "--dtype=float32")
    arguments = to_arguments(given, WorkerSettings)
    assert len(arguments) == 4
    assert worker(*arguments) == given
