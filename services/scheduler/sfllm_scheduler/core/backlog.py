"""How long a request would wait behind those before it, from how fast they were granted lately."""

from __future__ import annotations

LEAST_GRANTS = 8
"""Fewer say nothing about a rate."""

FORGET_GRANTS = 64
FORGET_SECONDS = 60.0


class Backlog:
    """Counts grants of one model while requests wait for room, and only then.

    A rate that is measured while nothing waits is the rate of arrivals, not what the workers could do.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._grants = 0.0

    def note(self, grants: int, left: int, now: float) -> None:
        """So many requests were granted, and so many are left waiting for room."""
        if left == 0:
            self.reset()
        elif self._since is None:
            self._since = now
        else:
            self._grants += grants
            if self._grants >= FORGET_GRANTS and now - self._since >= FORGET_SECONDS:
                self._grants /= 2  # what happened long ago counts less and less
                self._since = (self._since + now) / 2

    def reset(self) -> None:
        """Start anew: nothing waits, or workers came or left."""
        self._since = None
        self._grants = 0.0

    def expected_wait(self, before: int, at_once: int, now: float) -> float | None:
        """Seconds until so many requests have been granted; None when nobody knows.

        `at_once` is how many the workers run at a time. They may all be about to end, so they are
        counted as granted: the wait may be longer than this says, hardly shorter.
        """
        if self._since is None or self._grants < LEAST_GRANTS or now <= self._since:
            return None
        return before * (now - self._since) / (self._grants + at_once)
