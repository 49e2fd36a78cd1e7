"""What came back for a request, kept until its answer ends: tokens of choices, log probabilities. Pure.

Everything is indexed by position, so that what comes twice is trimmed and what is missing is noticed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from sfllm.token_batch import NO_LOGPROBS, Logprobs


class LogprobRows:
    """`width` candidates for each of some tokens, one token after another; `width` 0 keeps none."""

    __slots__ = ("_ids", "_values", "width")

    def __init__(self, width: int) -> None:
        self.width = width
        self._ids: array[int] = array("I")
        self._values: array[float] = array("f")

    def __len__(self) -> int:
        """For how many tokens."""
        return len(self._ids) // self.width if self.width else 0

    def add(self, found: Logprobs, skip: int, count: int) -> None:
        """Append `count` tokens of `found`, after its first `skip`."""
        part = slice(skip * self.width, (skip + count) * self.width)
        self._ids.extend(found.ids[part])
        self._values.extend(found.values[part])

    def keep(self, count: int) -> None:
        """Drop all but the first `count` tokens."""
        del self._ids[count * self.width :]
        del self._values[count * self.width :]

    def part(self, start: int, end: int) -> Logprobs:
        """Those of tokens `start .. end`."""
        found = slice(start * self.width, end * self.width)
        return Logprobs(self.width, self._ids[found], self._values[found])


class ChoiceJournal:
    """The tokens of one choice with their log probabilities, and how it ended (None while it goes on).

    `width` is how many candidates come with each token, 0 for none.
    """

    __slots__ = ("finish_reason", "ids", "logprobs", "stop_token_id")

    def __init__(self, width: int = 0) -> None:
        self.ids: array[int] = array("I")
        self.logprobs = LogprobRows(width)
        self.finish_reason: str | None = None
        self.stop_token_id = -1

    def add(self, start: int, ids: Sequence[int], limit: int, logprobs: Logprobs = NO_LOGPROBS) -> bool:
        """Append tokens `start ..` as far as they are new, up to `limit` in all.

        False, and nothing is changed, if they do not follow what is here or come without the
        log probabilities that were asked for.
        """
        known = len(self.ids)
        if start > known:
            return False
        fresh = ids[known - start : max(limit, known) - start]
        if not len(fresh):
            return True
        if logprobs.width != self.logprobs.width:
            return False
        self.ids.extend(fresh)
        if logprobs.width:
            self.logprobs.add(logprobs, known - start, len(fresh))
        return True

    def keep(self, count: int) -> None:
        """Drop all but the first `count` tokens."""
        del self.ids[count:]
        self.logprobs.keep(count)


class PromptJournal:
    """Log probabilities of a prompt's tokens. The first token has none, so `tokens` - 1 are `complete`.

    `width` is how many candidates come with each token; 0 wants none and is complete from the start.
    """

    def __init__(self, tokens: int, width: int) -> None:
        self.logprobs = LogprobRows(width)
        self._expected = tokens - 1 if width else 0

    @property
    def complete(self) -> bool:
        """Whether all are here."""
        return not self._expected or len(self.logprobs) >= self._expected

    def add(self, start: int, found: Logprobs) -> bool:
        """Append those of prompt tokens `start ..` as far as they are new.

        False, and nothing is changed, if they do not follow what is here.
        """
        if not self._expected:
            return True
        known = len(self.logprobs) + 1
        if start > known or found.width != self.logprobs.width:
            return False
        count = min(len(found.ids) // found.width, self._expected + 1 - start) - (known - start)
        if count > 0:
            self.logprobs.add(found, known - start, count)
        return True
