"""What a check says: how it stands, what that means, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

Status = Literal["ok", "warning", "problem"]


class Finding(msgspec.Struct, frozen=True):
    """The outcome of one check. `meaning` and `remedy` are a line each; `remedy` is empty if all is well."""

    check: str
    status: Status
    meaning: str
    remedy: str = ""


def ok(check: str, meaning: str, remedy: str = "") -> Finding:
    """All is well; `remedy` may say how more could be checked."""
    return Finding(check, "ok", meaning, remedy)


def warning(check: str, meaning: str, remedy: str) -> Finding:
    """It serves, but worse than it could, or not for long."""
    return Finding(check, "warning", meaning, remedy)


def problem(check: str, meaning: str, remedy: str) -> Finding:
    """Something does not work, or stands open."""
    return Finding(check, "problem", meaning, remedy)


def exit_code(findings: Sequence[Finding]) -> int:
    """1 when there is a problem; warnings leave it at 0."""
    return int(any(finding.status == "problem" for finding in findings))
