"""The findings as a table for people and as JSON for programs."""

from __future__ import annotations

import collections
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sfllm_cli.doctor.findings import Finding, exit_code
from sfllm_cli.errors import CommandError

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_FILE_WIDTH = 200
"""Files and pipes get whole lines rather than cells broken in two."""


def show(findings: Sequence[Finding], file: TextIO) -> None:
    """Write the table and a line that sums it up; coloured on a terminal."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("", "check", "what it means", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        status = Text(finding.status, _COLOURS[finding.status])
        table.add_row(status, Text(finding.check), Text(finding.meaning), Text(finding.remedy))
    console = Console(file=file, width=None if file.isatty() else _FILE_WIDTH, highlight=False)
    console.print(table)
    counts = collections.Counter(finding.status for finding in findings)
    console.print(f"\n{counts['problem']} problems, {counts['warning']} warnings, {counts['ok']} ok")


def write_json(findings: Sequence[Finding], path: str) -> None:
    """Write the findings to a file, or to standard output for `-`. Raises `CommandError`."""
    document = {
        "ok": exit_code(findings) == 0,
        "findings": findings,
    }
    data = msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
    if path == "-":
        sys.stdout.write(data.decode())
        return
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
