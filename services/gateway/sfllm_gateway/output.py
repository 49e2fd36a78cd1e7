"""From the journal of one choice to the text that its client sees. Pure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from sfllm_gateway.detokenize import Detokenizer
from sfllm_gateway.journal import ChoiceJournal
from sfllm_gateway.stops import StopMatcher


class Advance(NamedTuple):
    """What reading on gave: text to show, tokens behind it, and where a stop string ended it.

    `kept_tokens` is how many tokens of the choice remain after a stop string, None without one.
    """

    text: str
    tokens: int
    kept_tokens: int | None = None


class ChoiceOutput:
    """Reads a journal on, token by token where stop strings are looked for, else all at once.

    Stop strings do not count before `min_tokens` tokens. `matched` is the one that was found.
    With `discards`, tokens are only waited for: the choice ends with none, as if there had been no room.
    """

    def __init__(
        self,
        journal: ChoiceJournal,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        max_tokens: int = sys.maxsize,
        discards: bool = False,
    ) -> None:
        self.journal = journal
        self.matched: str | None = None
        self.finished = False
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops, include_stop) if stops else None
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        self._discards = discards
        self._read = 0

    @property
    def unread(self) -> bool:
        """Whether `advance` would find something new.

        The last token that is allowed waits for the end that is right behind it, so that one event has both.
        """
        journal = self.journal
        if journal.finish_reason is None and (self._discards or len(journal.ids) >= self._max_tokens):
            return False
        return len(journal.ids) > self._read or (journal.finish_reason is not None and not self.finished)

    def advance(self, most: int = sys.maxsize) -> Advance:
        """Read what is new, at most so many tokens; with the journal's end comes what text was held back."""
        if self._discards:
            self.journal.keep(0)
            self.journal.finish_reason, self.journal.stop_token_id = "length", -1
            self.finished = True
            return Advance("", 0)
        start = self._read
        fresh = self.journal.ids[start : start + most]
        self._read = start + len(fresh)
        ends = self.journal.finish_reason is not None and self._read == len(self.journal.ids)
        self.finished = ends
        if self._matcher is None:
            text = self._detokenizer.feed(fresh) + (self._detokenizer.finish() if ends else "")
            return Advance(text, len(fresh))
        return self._search(self._matcher, start, fresh, ends)

    def _search(self, matcher: StopMatcher, start: int, fresh: Sequence[int], ends: bool) -> Advance:
        shown = []
        for count, token in enumerate(fresh, start=start + 1):
            piece = self._detokenizer.feed((token,))
            if count < self._min_tokens:
                shown.append(piece)
                continue
            match = matcher.feed(piece)
            shown.append(match.text)
            if match.stop is not None:
                return self._stopped(match.stop, shown, start, count)
        if ends:
            match = matcher.feed(self._detokenizer.finish())
            shown.append(match.text)
            if match.stop is not None:
                return self._stopped(match.stop, shown, start, self._read)
            shown.append(matcher.finish())
        return Advance("".join(shown), len(fresh))

    def _stopped(self, stop: str, shown: Sequence[str], start: int, kept: int) -> Advance:
        self.matched = stop
        self.finished = True
        self._read = kept
        return Advance("".join(shown), kept - start, kept)
