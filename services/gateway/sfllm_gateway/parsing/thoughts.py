"""Counting the tokens of a choice's reasoning without making tokens of its text again. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sfllm_gateway.parsing.deltas import Delta


class ThoughtCounter:
    """`tokens` so far belong to reasoning, its marks included.

    The token that ends it counts; tokens without text may be one or two too many or too few.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self.tokens = 0
        self._token_bytes = token_bytes
        self._ids: list[int] = []
        self._text = ""
        self._over = False

    def add(self, ids: Sequence[int], text: str, delta: Delta) -> None:
        """Take further tokens and their text, and what a parser said of it."""
        if self._over:
            return
        self._ids += ids
        self._text += text
        if delta.thought == len(self._text):
            self.tokens += len(self._ids) if delta.thought else 0
        else:
            self.tokens += self._covering(len(self._text[: delta.thought].encode()))
        self._over = bool(delta.content or delta.calls) or 0 < delta.thought < len(self._text)
        if delta.thought or self._over:
            self._ids, self._text = [], ""

    def _covering(self, size: int) -> int:
        """How many tokens it takes for so many bytes."""
        for count, token in enumerate(self._ids):
            if size <= 0:
                return count
            size -= len(self._token_bytes(token))
        return len(self._ids)
