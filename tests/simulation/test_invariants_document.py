"""docs/invariants.md names checks that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_check_that_the_document_names_exists() -> None:
    text = (ROOT / "docs" / "invariants.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| \d ", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 10))
    named = re.findall(r"`((?:tests|services)/[\w/.]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for path, function in named:
        source = (ROOT / path).read_text()
        assert not function or re.search(rf"^\s*(async )?def {function}\(", source, re.MULTILINE), (
            path,
            function,
        )
