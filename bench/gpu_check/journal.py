"""What a run of checks has come to, as lines of a file that outlives the process which writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

OK, FAILED, SKIPPED, NOT_RUN = "ok", "FAILED", "skipped", "not run"


class Outcome(NamedTuple):
    """How a check went: one of the words above, and what was found."""

    state: str
    title: str
    text: str


class Journal:
    """Titles, beginnings and outcomes, each written to the file at once. A check is begun once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.titles: list[str] = []
        self.begun: list[str] = []
        self.outcomes: list[Outcome] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            self._take(json.loads(line))

    def _take(self, entry: dict[str, Any]) -> None:
        self.titles += [title for title in entry.get("titles", ()) if title not in self.titles]
        self.begun += entry.get("begun", ())
        if "outcome" in entry:
            self.outcomes.append(Outcome(*entry["outcome"]))

    def _write(self, **entry: object) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self._take(entry)

    def plan(self, titles: Iterable[str]) -> None:
        """These checks are to be run."""
        self._write(titles=list(titles))

    def begin(self, title: str) -> None:
        """This check begins now."""
        self._write(begun=[title])

    def end(self, outcome: Outcome) -> None:
        """A check has come to this."""
        self._write(outcome=list(outcome))

    @property
    def broken_off(self) -> str | None:
        """The check that was begun last, if it has no outcome."""
        ended = {outcome.title for outcome in self.outcomes}
        return next((title for title in reversed(self.begun) if title not in ended), None)

    def all_outcomes(self) -> list[Outcome]:
        """Of every planned check, those that were never reached included."""
        found = {outcome.title: outcome for outcome in self.outcomes}
        missing = Outcome(NOT_RUN, "", "there was no time left")
        planned = [found.pop(title, missing._replace(title=title)) for title in self.titles]
        return planned + list(found.values())


def summary(outcomes: Sequence[Outcome], longest: int = 600) -> str:
    """The failures, each cut to so many characters, and the counts."""
    lines = [
        f"{outcome.state} {outcome.title}: {outcome.text[:longest]}"
        for outcome in outcomes
        if outcome.state in {FAILED, NOT_RUN}
    ]
    counts = {state: sum(outcome.state == state for outcome in outcomes) for state in (OK, FAILED, SKIPPED)}
    missing = len(outcomes) - sum(counts.values())
    return "\n".join([*lines, f"{counts[OK]} passed, {counts[FAILED]} failed, {counts[SKIPPED]} skipped"]) + (
        f", {missing} not run" if missing else ""
    )
