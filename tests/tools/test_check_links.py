from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("check_links", Path(__file__).with_name("check_links.py"))
assert _spec is not None
assert _spec.loader is not None
check_links = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_links)


def test_links_to_files_and_headings_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.md").write_text(
        "# One `two`, three\n[up](b.md#again-1) [self](#one-two-three) [web](https://example.org/x)\n"
        "```\n[code](missing.md)\n```\n`[inline](missing.md)`\n"
    )
    (tmp_path / "b.md").write_text("# Again\n# Again\n")
    assert check_links.main(tmp_path) == 0, capsys.readouterr().out


def test_a_missing_file_and_a_missing_heading_are_told_with_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.md").write_text("words\n[x](gone.md) [y](#nowhere)\n")
    assert check_links.main(tmp_path) == 1
    out = capsys.readouterr().out
    assert "a.md:2: gone.md: there is no such file" in out
    assert "a.md:2: #nowhere: there is no such heading" in out


def test_the_documents_of_this_project_have_no_dead_links(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_links.main() == 0, capsys.readouterr().out
