"""What a run found, as a table for people and a file for machines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chaos.tally import Tally


@dataclasses.dataclass
class Report:
    """The outcome of a run. It `failed` when anything was lost, doubled, wrong, in error or leaked."""

    command: str
    seconds: float
    tally: Tally
    faults: Mapping[str, int]
    moves: int
    leaks: Mapping[str, float]
    exit_codes: Mapping[str, int | None]
    problems: list[str]

    @property
    def failed(self) -> bool:
        """Whether the run must be looked into."""
        clean = all(code == 0 for code in self.exit_codes.values())
        return bool(sum(self.tally.failures.values()) or self.leaks or self.problems) or not clean

    def numbers(self) -> dict[str, Any]:
        """Everything, in plain types."""
        tally = self.tally
        return {
            "command": self.command,
            "seconds": round(self.seconds, 1),
            "streams": tally.streams,
            "complete": tally.complete,
            "tokens": tally.tokens,
            "left by the client": tally.left,
            "ended with their gateway": tally.with_gateway,
            "turned away before acceptance": tally.turned_away,
            "faults": dict(sorted(self.faults.items())),
            "moves": self.moves,
            "longest pause seconds": round(tally.longest_pause_seconds, 2),
            "longest pause in request": tally.longest_pause_request,
            **tally.failures,
            "near ties": tally.near_ties,
            "leaks": dict(self.leaks),
            "exit codes": dict(self.exit_codes),
            "problems": [*tally.lines, *self.problems],
        }

    def write(self, path: Path) -> None:
        """The JSON file."""
        path.write_text(json.dumps(self.numbers(), indent=2) + "\n")

    def table(self) -> str:
        """A line for each number, and one for each problem."""
        lines = []
        for name, value in self.numbers().items():
            if isinstance(value, dict):
                lines.append(
                    f"{name:30} {', '.join(f'{key} {count}' for key, count in value.items()) or 'none'}"
                )
            elif not isinstance(value, list):
                lines.append(f"{name:30} {value}")
        problems = self.numbers()["problems"]
        return "\n".join(
            [*lines, *(f"  ! {line}" for line in problems), "FAILED" if self.failed else "passed"]
        )
