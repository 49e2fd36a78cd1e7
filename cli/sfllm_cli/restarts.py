"""When to restart a process that died, and when to give up: pure decisions about given times."""

from __future__ import annotations

import dataclasses

USAGE_EXIT_CODE = 2
"""A process that refuses its own settings says so with this exit code; starting it again is no use."""


@dataclasses.dataclass(frozen=True)
class RestartPolicy:
    """The n-th death in a row is answered after `first_delay_seconds * 2**(n - 1)`, bounded.

    `crash_limit` deaths within `window_seconds`, none of which had served, end it all.
    A process that lived for `window_seconds` starts with a clean record.
    The bound is lower for deaths after serving: a request that kills workers is found by a few more
    deaths, and until then the requests that were granted beside it wait for each restart.
    """

    crash_limit: int = 5
    window_seconds: float = 60.0
    first_delay_seconds: float = 0.5
    max_delay_seconds: float = 15.0
    max_delay_after_serving_seconds: float = 1.0


@dataclasses.dataclass(frozen=True)
class GiveUp:
    """Do not start it again; `reason` says why, as a sentence part after the process's name."""

    reason: str


class RestartHistory:
    """The deaths of one process, and what to do about the latest."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._in_a_row = 0
        self._crashes: list[float] = []

    def died(self, now: float, *, lived_seconds: float, served: bool, exit_code: int) -> float | GiveUp:
        """Seconds to wait before the next start, or `GiveUp`.

        `served` says whether the stack answered requests during this life: a process that
        fails under load is worth restarting for ever, one that never gets going is not.
        One that served and ended with 0 was asked to, by somebody who wants it restarted.
        """
        policy = self._policy
        refused = exit_code == USAGE_EXIT_CODE
        if refused and not served:
            return GiveUp("refused its settings")
        if lived_seconds >= policy.window_seconds or (served and exit_code == 0):
            self._in_a_row = 0
        if served:
            self._crashes.clear()
        else:
            self._crashes = [at for at in self._crashes if now - at < policy.window_seconds] + [now]
            if len(self._crashes) >= policy.crash_limit:
                return GiveUp(f"died {len(self._crashes)} times without becoming ready")
        self._in_a_row += 1
        factor = 2.0 ** min(self._in_a_row - 1, 30)
        fell_while_working = served and not refused
        longest = policy.max_delay_after_serving_seconds if fell_while_working else policy.max_delay_seconds
        return min(longest, policy.first_delay_seconds * factor)
