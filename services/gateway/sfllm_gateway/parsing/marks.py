"""Looking for marks in text that arrives in pieces."""

from __future__ import annotations

SPACE = " \t\n\r"


def held_back(text: str, mark: str) -> int:
    """How many characters at the end of a text, with the space before them, could become the mark."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    begun = next((size for size in sizes if mark.startswith(text[-size:])), 0)
    before = text[: len(text) - begun]
    return begun + len(before) - len(before.rstrip(SPACE))
