"""What `sfllm doctor` may say, read from its code: `python tests/tools/doctor_findings.py docs/doctor.md`.

Writes the table between the marks in the document anew. What a finding fills in is shown as an ellipsis.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

CHECKS = Path(__file__).parents[2] / "cli" / "sfllm_cli" / "doctor"
MARKS = "<!-- findings -->\n", "<!-- end of findings -->\n"
STATUSES = ("problem", "warning")
HEAD = "| check | | what it says | what to do |\n|---|---|---|---|\n"


class Row(NamedTuple):
    """One thing that it may say."""

    check: str
    status: str
    meaning: str
    remedy: str


def rows() -> list[Row]:
    """Every problem and warning of every check, in the order of the code."""
    found = []
    for path in sorted(CHECKS.glob("*_checks.py")):
        module = ast.parse(path.read_text())
        shared = _names(module.body)
        for function in ast.walk(module):
            if isinstance(function, ast.FunctionDef):
                found += _of_function(function, shared)
    return list(dict.fromkeys(found))


def table() -> str:
    """The rows as Markdown."""
    lines = (f"| {row.check} | {row.status} | {row.meaning} | {row.remedy} |\n" for row in rows())
    return HEAD + "".join(lines)


def _of_function(function: ast.FunctionDef, shared: dict[str, str]) -> Iterator[Row]:
    names = shared | _names(ast.walk(function))
    for call in ast.walk(function):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in STATUSES:
            check, meaning, remedy = (_text(argument, names) for argument in call.args)
            yield Row(check, call.func.id, meaning, remedy)


def _names(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """What names are assigned once, as text."""
    found: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            for name, text in pairs:
                if isinstance(name, ast.Name):
                    found[name.id] = _text(text, found)
    return found


def _text(node: ast.expr, names: dict[str, str]) -> str:
    """A string as it will be, with an ellipsis for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return re.sub(r"(\.\.\.)+", "...", "".join(_text(part, names) for part in parts))
        case ast.FormattedValue(value=value):
            return _text(value, names)
        case ast.Name(id=name):
            return names.get(name, "...")
        case _:
            return "..."


def write(path: Path) -> None:
    """Put the table between the marks."""
    before, _, rest = path.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    path.write_text(before + MARKS[0] + table() + MARKS[1] + after)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
