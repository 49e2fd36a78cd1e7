"""`sfllm keys`: what it prints, what it stores, and how `serve` hands keys on."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfllm.api_keys import hash_of, parse_keys
from sfllm.config import parse
from sfllm.settings import GatewaySettings
from sfllm_cli.main import main
from sfllm_cli.serve_plan import child_specs
from sfllm_cli.settings import AllServeSettings, split


def test_a_key_is_printed_alone_and_stored_as_its_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    assert main(["keys", "add", "team-a", str(file)]) == 0
    first = capsys.readouterr().out.strip()
    assert main(["keys", "add", "team-b", str(file)]) == 0
    second = capsys.readouterr().out.strip()
    assert first not in file.read_text()
    assert parse_keys(file.read_text()) == {
        hash_of(first.encode()): "team-a",
        hash_of(second.encode()): "team-b",
    }
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_last_line_without_an_end_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine")
    assert main(["keys", "add", "a", str(file)]) == 0
    assert file.read_text().startswith("# mine\na:")


@pytest.mark.parametrize(("name", "content"), [("a b", "#\n"), ("a", "not a file of keys\n")])
def test_nothing_is_added_to_a_broken_file_or_under_a_bad_name(
    tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    assert main(["keys", "add", name, str(file)]) == 1
    assert file.read_text() == content
    out = capsys.readouterr()
    assert out.out == ""
    assert "no key was added" in out.err


def test_serve_gives_keys_to_gateways_alone_and_not_on_their_command_line(tmp_path: Path) -> None:
    given = split(
        parse(
            AllServeSettings,
            prog="serve",
            description="",
            argv=[],
            environ={"SFLLM_API_KEY": "sk-one,sk-two"},
        )
    )
    specs = child_specs(given, tmp_path, {"SFLLM_API_KEY": "sk-one,sk-two"}, cores=2)
    assert not [spec for spec in specs if "sk-one" in " ".join(spec.command)]
    assert [spec.name for spec in specs if "SFLLM_API_KEY" in spec.environment] == ["gateway-0"]
    gateway = next(spec for spec in specs if spec.name == "gateway-0")
    found = parse(
        GatewaySettings, prog="", description="", argv=gateway.command[3:], environ=gateway.environment
    )
    assert found.api_key == ("sk-one", "sk-two")
