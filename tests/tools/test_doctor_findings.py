"""docs/doctor.md has everything that the code may say, in its words."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sfllm_cli.doctor.api_checks import _REMEDIES

_spec = importlib.util.spec_from_file_location(
    "doctor_findings", Path(__file__).with_name("doctor_findings.py")
)
assert _spec is not None
assert _spec.loader is not None
doctor_findings = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(doctor_findings)

DOCUMENT = Path(__file__).parents[2] / "docs" / "doctor.md"


def test_the_document_has_every_finding_as_the_code_has_it(tmp_path: Path) -> None:
    """If not: `python tests/tools/doctor_findings.py docs/doctor.md`."""
    copy = tmp_path / "doctor.md"
    copy.write_text(DOCUMENT.read_text())
    doctor_findings.write(copy)
    assert copy.read_text() == DOCUMENT.read_text()


def test_every_finding_says_what_to_do() -> None:
    found = doctor_findings.rows()
    assert len(found) > 50
    silent = [row for row in found if row.remedy in ("", "...")]
    assert [row.check for row in silent] == ["ready"]  # which has a table of its own


def test_the_document_says_what_to_do_for_every_reason_of_not_being_ready() -> None:
    text = DOCUMENT.read_text()
    for reason, remedy in _REMEDIES:
        assert f"| {reason} | {remedy} |" in text
