"""How fast the queue empties, and from that when a refused client should come back."""

from __future__ import annotations

from math import ceil, exp

WINDOW_SECONDS = 10.0
UNKNOWN_RETRY_SECONDS = 5.0
LONGEST_RETRY_SECONDS = 60.0


class DrainRate:
    """Grants per second, weighted towards the last `WINDOW_SECONDS`."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._at = 0.0
        self._since: float | None = None

    def add(self, grants: int, now: float) -> None:
        """Count requests that left the queue for a worker."""
        self._weight = self._decayed(now) + grants
        self._at = now
        if self._since is None:
            self._since = now

    def retry_after(self, waiting: int, now: float) -> float:
        """Whole seconds until a queue of that many will be about empty, between 1 and 60."""
        if self._since is None:
            return UNKNOWN_RETRY_SECONDS
        # In its first seconds the window is not full yet; dividing by all of it would understate the rate.
        window = WINDOW_SECONDS * (1.0 - exp((self._since - now - 1.0) / WINDOW_SECONDS))
        rate = self._decayed(now) / window
        if rate < 0.01:
            return LONGEST_RETRY_SECONDS
        return float(min(max(ceil(waiting / rate), 1), LONGEST_RETRY_SECONDS))

    def _decayed(self, now: float) -> float:
        return self._weight * exp(min(0.0, self._at - now) / WINDOW_SECONDS)
