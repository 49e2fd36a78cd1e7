"""How many threads compute a step: as many as turned out to be fastest. Pure; the caller measures.

A step of few tokens is bound by memory, which one or two cores can saturate, and its threads wait for each
other hundreds of times. On a machine where gateway, scheduler and clients need a core now and then, such a
step is faster on fewer threads than there are cores: nobody waits for one that had to leave its core.
How many is a matter of the machine and of the moment, so it is tried out, again and again. Results do not
depend on the number of threads, to the last bit.
"""

from __future__ import annotations

from collections import deque
from math import inf
from statistics import median

MOST_TOKENS = 8
"""Steps of more tokens take all threads: products bound them, which every core makes faster."""

TRIAL_STEPS = 4
REMEMBERED_STEPS = 9
FIRST_INTERVAL_STEPS = 16
LONGEST_INTERVAL_STEPS = 4096
"""A trial of what is slower is seen by whoever waits for those tokens: fewer than one in a thousand."""

CLEARLY_FASTER = 0.97
MUCH_SLOWER = 1.3
"""Than at the last trial: something has changed, and another number may be better now."""


class ThreadChoice:
    """One number of threads for each size of step, and when to try another.

    Every so many steps a neighbouring number (half or twice as many) gets `TRIAL_STEPS` steps; it stays if
    it was clearly faster than what went before. Trials that change nothing become rarer, until steps take
    much longer than they did.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def choose(self, tokens: int, most: int) -> int:
        """How many of at most `most` threads should compute the next step of so many tokens."""
        if tokens > MOST_TOKENS or most == 1:
            return most
        size = self._sizes.get(tokens)
        if size is None or size.most != most:
            size = self._sizes[tokens] = _Size(most)
        return size.threads

    def saw(self, tokens: int, seconds: float) -> None:
        """The step for which `choose` was asked last took so long."""
        size = self._sizes.get(tokens)
        if size is not None:
            size.saw(seconds)


class _Size:
    """Steps of one size. `threads` is what the next step gets, `_best` what it gets outside of trials."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.threads = self._best = most
        self._usual: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._trial: list[float] = []
        self._interval = self._left = FIRST_INTERVAL_STEPS
        self._tries_fewer = False
        self._normal = inf

    def saw(self, seconds: float) -> None:
        """The step on `threads` threads took so long."""
        if self.threads != self._best:
            self._trial.append(seconds)
            if len(self._trial) == TRIAL_STEPS:
                self._judge()
            return
        self._usual.append(seconds)
        self._left -= 1
        if self._left <= 0 or (self._left % FIRST_INTERVAL_STEPS == 0 and self._has_slowed()):
            self._tries_fewer = not self._tries_fewer
            self.threads = self._neighbour()

    def _has_slowed(self) -> bool:
        return median(self._usual) > MUCH_SLOWER * self._normal

    def _neighbour(self) -> int:
        fewer, more = (self._best + 1) // 2, min(2 * self._best, self.most)
        first, second = (fewer, more) if self._tries_fewer else (more, fewer)
        return first if first != self._best else second

    def _judge(self) -> None:
        # The first step of a trial pays for the change itself: threads fall asleep or wake up.
        trial, usual = median(self._trial[1:]), median(self._usual)
        if trial < CLEARLY_FASTER * usual:
            self._best = self.threads
            self._usual.clear()
            self._interval = FIRST_INTERVAL_STEPS
        else:
            self._interval = min(2 * self._interval, LONGEST_INTERVAL_STEPS)
        self._normal = min(trial, usual)
        self._trial.clear()
        self.threads = self._best
        self._left = self._interval
