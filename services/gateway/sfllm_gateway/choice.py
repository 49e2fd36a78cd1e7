"""One choice of one prompt inside a session: where its tokens come from and what became of them."""

from __future__ import annotations

from collections.abc import Sequence

from sfllm_gateway.generation import Generation, Update, Usage
from sfllm_gateway.logprobs import Reporter, TokenReport, prompt_reports
from sfllm_gateway.output import ChoiceOutput
from sfllm_gateway.streams import OpenStream


class Choice:
    """`index` counts over all prompts of the HTTP request, `number` within the stream of one prompt.

    `tokens` were read so far, at `last_at` the last of them (monotonic seconds).
    """

    __slots__ = (
        *("_echo", "_generation", "_reporter", "_shown"),
        *("index", "last_at", "number", "opened", "output", "tokens"),
    )

    def __init__(self, index: int, generation: Generation, opened: OpenStream) -> None:
        self.index = index
        self.number = index % generation.n
        self.opened = opened
        self.tokens = 0
        self.last_at: float | None = None
        self._generation = generation
        sampling = opened.stream.request.sampling
        detokenizers = generation.model.text.detokenizers
        self.output = ChoiceOutput(
            opened.stream.choices[self.number],
            detokenizers.make(generation.skip_special_tokens, generation.shown_tokens),
            generation.stops,
            generation.include_stop,
            sampling.min_tokens,
            sampling.max_tokens,
            generation.discards,
        )
        self._shown = 0
        self._echo = None if generation.echo is None else generation.echo[index // generation.n]
        self._reporter = None
        if generation.logprobs is not None:
            detokenizer = detokenizers.make(generation.skip_special_tokens, generation.shown_tokens)
            self._reporter = Reporter(detokenizer, len(self._echo or ""))

    def update(self, text: str) -> Update:
        """News for the client: this text, and the tokens since the last news."""
        journal = self.output.journal
        start, self._shown = self._shown, self.tokens
        reason = journal.finish_reason if self.output.finished else None
        matched: str | int | None = self.output.matched
        if matched is None and journal.stop_token_id >= 0:
            matched = journal.stop_token_id
        logprobs = self._logprobs(start)
        if self._echo is not None:
            text, self._echo = self._echo + text, None
        return Update(
            choice=self.index,
            text=text,
            ids=journal.ids[start : self.tokens],
            usage=Usage(len(self.opened.stream.request.prompt), self.tokens, cached_tokens(self.opened)),
            finish_reason=reason,
            matched=None if reason is None else matched,
            logprobs=logprobs,
            prompt_logprobs=None if reason is None else self._prompt_logprobs(),
            embedding=self.opened.stream.embedding,
        )

    def _logprobs(self, start: int) -> Sequence[TokenReport] | None:
        """Of the tokens since `start`, after those of a prompt that is still to be echoed."""
        most = self._generation.logprobs
        if most is None or self._reporter is None:
            return None
        reports = self._reporter.report(self.output.journal.logprobs.part(start, self.tokens), most)
        return reports if self._echo is None else [*self._of_prompt(most), *reports]

    def _prompt_logprobs(self) -> Sequence[TokenReport] | None:
        most = self._generation.prompt_logprobs
        return None if most is None else self._of_prompt(most)

    def _of_prompt(self, most: int) -> list[TokenReport]:
        stream = self.opened.stream
        detokenizer = self._generation.model.text.detokenizers.make(self._generation.skip_special_tokens)
        found = stream.prompt.logprobs.part(0, len(stream.request.prompt) - 1)
        return prompt_reports(stream.request.prompt, found, most, detokenizer)


def cached_tokens(opened: OpenStream) -> int:
    """Prompt tokens that the worker had in its cache; known when a choice has finished."""
    finished = opened.stream.last_finished
    return 0 if finished is None else finished.cached_tokens
