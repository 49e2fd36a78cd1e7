"""What is told of single tokens: log probabilities, the likeliest ones, places in the text. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sfllm.token_batch import Logprobs
from sfllm_gateway.detokenize import Detokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class Candidate(NamedTuple):
    """A token and its log probability."""

    token: int
    logprob: float


class TokenReport(NamedTuple):
    """One token of a text. `logprob` is None for the first token of a prompt, which nothing predicts.

    `top` are the likeliest tokens there, best first. `offset` is where the token begins in the text, in
    characters; tokens that make up one character together begin where it does.
    """

    token: int
    logprob: float | None
    top: tuple[Candidate, ...]
    offset: int


class Reporter:
    """Reports on one choice's tokens in order. Its `detokenizer` finds their places, from `offset` on."""

    def __init__(self, detokenizer: Detokenizer, offset: int = 0) -> None:
        self._detokenizer = detokenizer
        self._offset = offset

    def report(self, found: Logprobs, most: int) -> list[TokenReport]:
        """On the tokens of `found`, with at most `most` of the likeliest ones each."""
        reports = []
        for start in range(0, len(found.ids), found.width or 1):
            token, *top = _candidates(found, start, 1 + most)
            reports.append(TokenReport(token.token, token.logprob, tuple(top), self._place(token.token)))
        return reports

    def report_first(self, token: int) -> TokenReport:
        """On the first token of a prompt."""
        return TokenReport(token, None, (), self._place(token))

    def _place(self, token: int) -> int:
        offset = self._offset
        self._offset += len(self._detokenizer.feed((token,)))
        return offset


def _candidates(found: Logprobs, start: int, count: int) -> list[Candidate]:
    end = start + min(count, found.width)
    # In this order `max` turns what is no number into the least one too.
    return [
        Candidate(token, max(LEAST_LOGPROB, value))
        for token, value in zip(found.ids[start:end], found.values[start:end], strict=True)
    ]


def prompt_reports(
    prompt: Sequence[int], found: Logprobs, most: int, detokenizer: Detokenizer
) -> list[TokenReport]:
    """On all tokens of a prompt; `found` has those after the first."""
    reporter = Reporter(detokenizer)
    return [reporter.report_first(prompt[0]), *reporter.report(found, most)]
