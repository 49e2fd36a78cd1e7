"""What `sfllm doctor` makes of files of keys: whether they can be used, and by whom they can be changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfllm.api_keys import key_line
from sfllm.link_keys import add_link_key, key_file, make_link_keys
from sfllm_cli.doctor.evidence import Api, Evidence, Process
from sfllm_cli.doctor.findings import Finding
from sfllm_cli.doctor.key_checks import check_keys
from sfllm_cli.doctor.key_files import read_api_keys, read_link_keys
from sfllm_cli.doctor.probe import Answer

SILENT = Api(Process("host:0", Answer(failure="refused"), Answer(), Answer()))


def api_keys(path: Path) -> Finding:
    """The one finding on a file of API keys."""
    (found,) = check_keys(Evidence(SILENT, (), None, api_keys=read_api_keys(str(path))))
    assert found.status == "ok" or found.remedy
    return found


@pytest.mark.parametrize(
    ("text", "mode", "status", "part"),
    [
        (key_line("team-a", "sk-a") + key_line("team-b", "sk-b"), 0o640, "ok", "2 keys"),
        (key_line("team-a", "sk-a"), 0o664, "problem", "may change it"),
        ("# nobody\n", 0o600, "warning", "nobody is let in"),
        ("", 0o600, "problem", "empty"),
        ("team-a:sk-the-key-itself\n", 0o600, "problem", "line 1 is not NAME:HASH"),
    ],
)
def test_a_file_of_api_keys_is_told_by_what_it_lets_others_do(
    tmp_path: Path, text: str, mode: int, status: str, part: str
) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(text)
    file.chmod(mode)
    found = api_keys(file)
    assert (found.status, part in found.meaning) == (status, True), found
    assert "the-key-itself" not in str(found)


def test_a_file_of_api_keys_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    found = api_keys(tmp_path / "keys.txt")
    assert (found.status, "No such file" in found.meaning) == ("problem", True)


def test_files_that_were_not_named_are_not_looked_for() -> None:
    assert list(check_keys(Evidence(SILENT, (), None))) == []


def link_keys(*paths: Path) -> dict[str, Finding]:
    """The findings on files of link keys, by the folder that each is in."""
    evidence = Evidence(SILENT, (), None, link_keys=read_link_keys([str(path) for path in paths]))
    found = {
        Path(each.check.removeprefix("link keys in ")).parent.name: each for each in check_keys(evidence)
    }
    secrets = [line for path in paths for file in path.rglob("link.keys") for line in _secrets(file)]
    assert not any(secret in str(found) for secret in secrets)
    return found


def _secrets(file: Path) -> list[str]:
    """What must never be shown of a file."""
    lines = file.read_text().splitlines()
    return [line.split('"')[1] for line in lines if line.startswith("secret-key")]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make_link_keys(tmp_path / "keys")
    return tmp_path / "keys"


def test_a_whole_set_of_link_keys_belongs_together(made: Path) -> None:
    add_link_key(made, "worker", "rack-2")
    found = link_keys(made)
    assert set(found) == {"scheduler", "gateway", "worker", "worker-rack-2"}
    assert {each.status for each in found.values()} == {"ok"}
    assert "1 gateways and 2 workers" in found["scheduler"].meaning
    assert "lets in" in found["worker-rack-2"].meaning


def test_a_part_of_a_set_that_is_missing_is_told(made: Path) -> None:
    key_file(made, "gateway").unlink()
    found = link_keys(made)
    assert {name: each.status for name, each in found.items()} == {
        "scheduler": "ok",
        "gateway": "problem",
        "worker": "ok",
    }
    assert "it is missing" in found["gateway"].meaning
    assert "--renew" in found["gateway"].remedy


def test_a_file_that_others_can_read_is_a_problem(made: Path) -> None:
    key_file(made, "worker").chmod(0o644)
    found = link_keys(made)["worker"]
    assert (found.status, "chmod 600" in found.meaning) == ("problem", True)


def test_a_key_that_the_scheduler_does_not_know_any_more_is_told(made: Path) -> None:
    own = add_link_key(made, "gateway", "b")
    scheduler = key_file(made, "scheduler")
    scheduler.write_text("".join(line for line in scheduler.open() if not line.startswith('"gateway-b"')))
    found = link_keys(own, scheduler)
    assert found["scheduler"].status == "ok"
    assert (found["gateway-b"].status, "does not let" in found["gateway-b"].meaning) == ("problem", True)


def test_a_key_of_another_set_is_told(made: Path, tmp_path: Path) -> None:
    make_link_keys(tmp_path / "other")
    found = link_keys(key_file(made, "scheduler"), key_file(tmp_path / "other", "worker"))
    assert (found["worker"].status, "another scheduler" in found["worker"].meaning) == ("problem", True)


def test_gateways_and_workers_are_not_blamed_for_a_scheduler_without_keys(made: Path) -> None:
    key_file(made, "scheduler").write_text("")
    assert {name for name, each in link_keys(made).items() if each.status == "problem"} == {"scheduler"}


def test_a_file_by_itself_is_judged_by_itself(made: Path) -> None:
    assert link_keys(key_file(made, "gateway"))["gateway"].status == "ok"


@pytest.mark.parametrize("text", ["", "secret-key = 'of-whom", 'role = "scheduler"\nsecret-key = "short"\n'])
def test_a_broken_file_is_told_without_its_content(made: Path, text: str) -> None:
    file = key_file(made, "scheduler")
    file.write_text(text)
    found = link_keys(file)["scheduler"]
    assert found.status == "problem"
    assert "of-whom" not in found.meaning
