"""What `sfllm doctor` makes of files of keys: whether they can be used, and by whom they can be changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfllm.api_keys import key_line, new_key
from sfllm_cli.doctor.evidence import Api, Evidence, Process
from sfllm_cli.doctor.findings import Finding
from sfllm_cli.doctor.key_checks import check_keys
from sfllm_cli.doctor.key_files import read_api_keys
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
        (key_line("team-a", new_key()) + key_line("team-b", new_key()), 0o640, "ok", "2 keys"),
        (key_line("team-a", new_key()), 0o664, "problem", "may change it"),
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
