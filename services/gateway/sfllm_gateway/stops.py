"""Finding stop strings in text that arrives in pieces, without ever showing a part of one.

`StopMatcher` holds back the longest end of the text that could still become a stop
string, and gives the rest away. Each string is followed by the automaton of Knuth,
Morris and Pratt, so that the work is linear in the text however long the strings are,
and the outcome does not depend on how the text was cut into pieces: the stop string
that is complete first wins, the longest one if several end together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """Text that may be shown now, and the stop string that ended it (None: goes on)."""

    text: str
    stop: str | None


class StopMatcher:
    """Watches one choice's text for `stops`; with `include`, the matched string is shown as well."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = stops
        self._failures = [_failure_table(stop) for stop in stops]
        self._states = [0] * len(stops)
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._include = include
        self._held = ""

    def feed(self, piece: str) -> StopMatch:
        """Take more text. After a match nothing more may be fed."""
        if not self._held and self._first_characters.isdisjoint(piece):
            return StopMatch(piece, None)
        text = self._held + piece
        for position, character in enumerate(piece, start=len(self._held) + 1):
            stop = self._step(character)
            if stop is not None:
                self._held = ""
                return StopMatch(text[: position if self._include else position - len(stop)], stop)
        keep = max(self._states, default=0)
        shown = len(text) - keep
        self._held = text[shown:]
        return StopMatch(text[:shown], None)

    def finish(self) -> str:
        """The text that was held back: it became no stop string after all."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _step(self, character: str) -> str | None:
        """Advance every automaton by a character; the longest stop string that ends here."""
        found: str | None = None
        for index, stop in enumerate(self._stops):
            state = self._states[index]
            failure = self._failures[index]
            while state and stop[state] != character:
                state = failure[state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                if found is None or len(stop) > len(found):
                    found = stop
                state = 0
            self._states[index] = state
        return found


def _failure_table(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for position in range(1, len(pattern)):
        while length and pattern[position] != pattern[length]:
            length = table[length - 1]
        if pattern[position] == pattern[length]:
            length += 1
        table[position] = length
    return table
