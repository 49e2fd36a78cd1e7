"""What a choice says as reasoning, content and calls, with reports on the tokens of the content. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sfllm_gateway.generation import Update
from sfllm_gateway.logprobs import TokenReport
from sfllm_gateway.parsing.deltas import Delta, OutputParser, PlainParser


class Piece(NamedTuple):
    """Further output, and reports on the tokens of its content."""

    delta: Delta
    reports: list[TokenReport]


class Parts:
    """Runs the updates of one choice through its parser, None where all is content.

    A parser does not say which tokens it made content of. So text with reports is given to it token by
    token, and what it calls content is taken to be the end of what it was given.
    """

    def __init__(self, parser: OutputParser | None) -> None:
        self._plain = parser is None
        self._parser = PlainParser() if parser is None else parser
        self._read = 0
        self._held: list[TokenReport] = []

    def feed(self, update: Update) -> Iterator[Piece]:
        """What the text of an update turned out to be."""
        reports = list(update.logprobs or ())
        start, end = self._read, self._read + len(update.text)
        cuts = {report.offset for report in reports if not self._plain and start < report.offset < end}
        for cut in (*sorted(cuts), end):
            while reports and (reports[0].offset < cut or cut == end):
                self._held.append(reports.pop(0))
            yield self._piece(update.text[self._read - start : cut - start])

    def finish(self, reason: str) -> tuple[Piece, str]:
        """What was held back, reports on tokens without shown text included, and why the choice ended."""
        delta, reason = self._parser.finish(reason)
        held = self._held if self._plain else self._content_reports(delta)
        return Piece(delta, held), reason

    def _piece(self, text: str) -> Piece:
        self._read += len(text)
        delta = self._parser.feed(text)
        if self._plain and not delta.content:
            return Piece(delta, [])
        reports = self._content_reports(delta)
        return Piece(delta, reports)

    def _content_reports(self, delta: Delta) -> list[TokenReport]:
        """Those of the held reports that are on the content of `delta`; none is held any longer."""
        held = self._held
        if not held or not (delta.content or delta.reasoning or delta.calls):
            return []
        self._held = []
        if self._plain:
            return held
        begin = self._read - len(delta.content)
        ends = [*(report.offset for report in held[1:]), self._read]
        return [
            report
            for report, end in zip(held, ends, strict=True)
            if delta.content and (report.offset >= begin or end > begin)
        ]
