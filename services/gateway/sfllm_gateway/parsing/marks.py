"""Looking for marks in text that arrives in pieces."""

from __future__ import annotations

SPACE = " \t\n\r"

MOST_SPACE = 64
"""So many characters of space before a mark are left out. Text of nothing else is not held back for ever."""


def without_space(text: str) -> str:
    """The text without the space at its end."""
    end = text[-MOST_SPACE:]
    return text[: len(text) - len(end) + len(end.rstrip(SPACE))]


def held_back(text: str, mark: str) -> int:
    """How many characters at the end of a text, with the space before them, could become the mark."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    begun = next((size for size in sizes if mark.startswith(text[-size:])), 0)
    return len(text) - len(without_space(text[: len(text) - begun]))
