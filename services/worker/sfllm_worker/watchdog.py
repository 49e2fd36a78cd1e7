"""Ends a process whose loop does not come around: a step that hangs would hold its streams for ever.

The timer is `faulthandler`'s, a thread of C that needs neither the interpreter nor its lock, so it
works even while an extension that is stuck holds that lock. It writes every thread's traceback to
standard error and ends the process; the scheduler notices, and whoever started the worker restarts it.
"""

from __future__ import annotations

import faulthandler

REARM_SECONDS = 1.0
SAFETY_FACTOR = 10.0
"""A step may take so many times as long as the longest one that was expected or seen."""

STEP_MEMORY = 0.999
"""The longest step seen is forgotten slowly: one that a pause of the whole machine made long should
not make the watchdog lenient for ever."""

UNHEALTHY_SHARE = 0.5
"""The health check complains after this share of the bound."""


class Watchdog:
    """Owner of the process's one timer from the first `turn` until `stop`. Times are monotonic seconds.

    `least_seconds` is the shortest bound; `expected_step_seconds` how long a full step is expected to take.
    """

    def __init__(self, least_seconds: float, expected_step_seconds: float) -> None:
        self._least_seconds = least_seconds
        self._expected_step_seconds = expected_step_seconds
        self._longest_step_seconds = 0.0
        self._turned_at: float | None = None
        self._armed_at = float("-inf")

    @property
    def bound_seconds(self) -> float:
        """How long a turn of the loop may take."""
        longest = max(self._expected_step_seconds, self._longest_step_seconds)
        return max(self._least_seconds, SAFETY_FACTOR * longest)

    def turn(self, now: float) -> None:
        """The loop came around."""
        self._turned_at = now
        if now - self._armed_at >= REARM_SECONDS:
            self._armed_at = now
            # What is armed now must hold until it is armed again.
            faulthandler.dump_traceback_later(self.bound_seconds + REARM_SECONDS, exit=True)

    def saw_step(self, seconds: float) -> None:
        """A step took so long."""
        self._longest_step_seconds = max(seconds, STEP_MEMORY * self._longest_step_seconds)

    def problem(self, now: float) -> str | None:
        """Why the loop seems to be stuck, or None. May be called from any thread."""
        silent = 0.0 if self._turned_at is None else now - self._turned_at
        if silent <= UNHEALTHY_SHARE * self.bound_seconds:
            return None
        return f"the loop has not turned for {silent:.0f} s"

    def stop(self) -> None:
        """The loop has ended: no timer any more."""
        faulthandler.cancel_dump_traceback_later()
        self._turned_at = None
