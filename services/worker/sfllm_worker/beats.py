"""Beats that go on while a step runs.

A step may take longer than a lease: a large model on a slow CPU, a machine that is busy
elsewhere. The worker is alive all the same, and its step counter, which beats carry, tells
whether it makes progress. So during a step a thread beats in the loop's place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from sfllm_worker.protocol_results import Outgoing

CHECKS_AN_INTERVAL = 10
LEAST_CHECK_SECONDS = 0.05
STOP_TIMEOUT_SECONDS = 5.0


class Beater:
    """Owner of the thread. A context manager that the loop's thread enters around all of its work.

    Invariant: the link belongs to whoever has the lock. The loop has it always but for `covering`,
    around a step, when it does not touch the link; only then the thread gets it. The thread knows
    nothing but the beat that it was given: what the worker holds does not change during a step.
    """

    def __init__(self, send: Callable[[Outgoing], None]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._beat: Outgoing | None = None
        self._interval = self._due = 0.0
        self._thread = threading.Thread(target=self._run, name="beater", daemon=True)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._thread.start()

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._lock.release()
        self._thread.join(STOP_TIMEOUT_SECONDS)

    def covering(self, beat: Outgoing | None, due: float, interval: float) -> _Step:
        """While inside, the thread sends `beat` at `due` and every `interval` seconds from then on.

        `due` is in monotonic seconds. Without a beat it sends nothing.
        """
        self._beat, self._due, self._interval = beat, due, interval
        return _Step(self._lock)

    def _run(self) -> None:
        while not self._stop.wait(max(self._interval / CHECKS_AN_INTERVAL, LEAST_CHECK_SECONDS)):
            # Never wait for the lock: if the loop has it, the loop beats.
            if self._lock.acquire(blocking=False):
                try:
                    if not self._stop.is_set():
                        self._beat_if_due(time.monotonic())
                finally:
                    self._lock.release()

    def _beat_if_due(self, now: float) -> None:
        if self._beat is not None and now >= self._due:
            self._due = now + self._interval
            self._send(self._beat)


class _Step:
    """While inside, the lock is free. Not a generator, which costs several times as much at every step."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.release()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.acquire()
