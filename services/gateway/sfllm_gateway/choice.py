"""One choice of one prompt inside a session: where its tokens come from and what became of them."""

from __future__ import annotations

from sfllm_gateway.generation import Update, Usage
from sfllm_gateway.link import OpenStream
from sfllm_gateway.output import ChoiceOutput


class Choice:
    """`index` counts over all prompts of the HTTP request, `number` within the stream of one prompt.

    `tokens` were read so far, at `last_at` the last of them (monotonic seconds).
    """

    __slots__ = ("_shown", "index", "last_at", "number", "opened", "output", "tokens")

    def __init__(self, index: int, number: int, opened: OpenStream, output: ChoiceOutput) -> None:
        self.index = index
        self.number = number
        self.opened = opened
        self.output = output
        self.tokens = 0
        self.last_at: float | None = None
        self._shown = 0

    def update(self, text: str) -> Update:
        """News for the client: this text, and the tokens since the last news."""
        journal = self.output.journal
        fresh = journal.ids[self._shown :]
        self._shown = self.tokens
        reason = journal.finish_reason if self.output.finished else None
        matched: str | int | None = self.output.matched
        if matched is None and journal.stop_token_id >= 0:
            matched = journal.stop_token_id
        return Update(
            choice=self.index,
            text=text,
            ids=fresh,
            usage=Usage(len(self.opened.stream.request.prompt), self.tokens, cached_tokens(self.opened)),
            finish_reason=reason,
            matched=None if reason is None else matched,
        )


def cached_tokens(opened: OpenStream) -> int:
    """Prompt tokens that the worker had in its cache; known when a choice has finished."""
    finished = opened.stream.last_finished
    return 0 if finished is None else finished.cached_tokens
