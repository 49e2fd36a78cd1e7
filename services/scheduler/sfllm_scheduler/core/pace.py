"""How long a request will run, from those that ended: for telling when it must start to be in time."""

from __future__ import annotations

from math import isfinite

FORGET_TOKENS = 100_000.0
"""When so many tokens were timed, all of them count half."""


class _Rate:
    """Seconds a token, weighted towards the latest ones; 0 while nothing is known."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0.0
        self.seconds_per_token = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """So many tokens took so long; what cannot be right is left out."""
        if tokens > 0 and isfinite(seconds) and seconds >= 0.0:
            self._seconds += seconds
            self._tokens += tokens
            self.seconds_per_token = self._seconds / self._tokens
            if self._tokens >= FORGET_TOKENS:
                self._seconds /= 2
                self._tokens /= 2


class Pace:
    """The pace of a model's workers at their present load."""

    def __init__(self) -> None:
        self._prefill = _Rate()
        self._decode = _Rate()

    def note(self, prefilled: int, prefill_seconds: float, generated: int, decode_seconds: float) -> None:
        """A request ended that took so long to prefill and to decode."""
        self._prefill.note(prefilled, prefill_seconds)
        self._decode.note(generated, decode_seconds)

    def seconds(self, prefill: int, output: float) -> float:
        """How long such a request runs; 0 while nothing is known."""
        return prefill * self._prefill.seconds_per_token + output * self._decode.seconds_per_token
