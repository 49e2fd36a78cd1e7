"""What a chat answer consists of, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class CallDelta(NamedTuple):
    """A further piece of the tool call `number` (from 0) of a choice.

    `id` and `name` come with the first piece of a call and are empty in all others; the `arguments`
    of all pieces together are its JSON.
    """

    number: int
    id: str
    name: str
    arguments: str


class Delta(NamedTuple):
    """What further text turned out to be. All empty while that cannot be told yet.

    `thought` is how many characters more, shown or not, are reasoning and the marks around it.
    """

    content: str = ""
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()
    thought: int = 0


class OutputParser(Protocol):
    """Reads the text of one choice as it comes. The outcome does not depend on how it was cut into pieces."""

    def feed(self, text: str) -> Delta:
        """Take further text."""

    def finish(self, reason: str) -> tuple[Delta, str]:
        """What was held back, and why the choice ended: "tool_calls" if "stop" came after a complete call."""


class PlainParser:
    """All is content."""

    def feed(self, text: str) -> Delta:
        """Content."""
        return Delta(text)

    def finish(self, reason: str) -> tuple[Delta, str]:
        """Nothing, and the same reason."""
        return Delta(), reason
