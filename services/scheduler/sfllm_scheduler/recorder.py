"""Writes a flight record (`core/flight.py`) of a live core: every event and a digest of what was decided."""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from sfllm_scheduler.core import flight
from sfllm_scheduler.core.core import SchedulerCore
from sfllm_scheduler.core.events import Action, Event

log = structlog.get_logger()

FLUSH_SECONDS = 0.5
BLOCK_BYTES = 2**18
"""A block is written when it has so much or is so old: a process that is killed loses no more than that."""


class Recorder:
    """Owns the file from construction until `close`. Raises OSError when it cannot be written.

    An older file of that name is kept beside it, with ".1" at its end: a scheduler that is started again
    after a crash must not write over the record of the crash. Recording ends when the file would grow
    beyond `max_bytes` or the disk takes no more; the scheduler goes on.
    """

    def __init__(self, path: Path, max_bytes: int, core: SchedulerCore, version: str) -> None:
        if path.exists():
            path.replace(path.with_name(path.name + ".1"))
        # Unbuffered: a block is one write, and there is one kind of buffer.
        self._file = path.open("xb", buffering=0)
        self._path = path
        self._core = core
        self._entries = bytearray()
        self._flush_at = 0.0
        self._closed = False
        begin = flight.opening(version, core.state.epoch, core.state.policy)
        self._left_bytes = max_bytes - len(begin)
        self._file.write(begin)
        log.info("recording", file=str(path), max_bytes=max_bytes)

    def handle(self, event: Event, now: float) -> list[Action]:
        """What the core does about `event`, which is written down, also when the core raises."""
        if self._closed:
            return self._core.handle(event, now)
        try:
            actions = self._core.handle(event, now)
        except BaseException:
            self._add(flight.make_entry(event, now, None))
            self.close()
            raise
        self._add(flight.make_entry(event, now, actions))
        if len(self._entries) >= BLOCK_BYTES or now >= self._flush_at:
            self._flush_at = now + FLUSH_SECONDS
            self._flush(now)
        return actions

    def close(self) -> None:
        """Write what is not written yet."""
        if not self._closed:
            self._flush(None)
            self._end()

    def _add(self, entry: bytes) -> None:
        self._entries += entry

    def _flush(self, now: float | None) -> None:
        if not self._entries:
            return
        block = flight.block(bytes(self._entries))
        self._entries.clear()
        last = flight.block(flight.full_entry(now or 0.0))
        try:
            if len(block) + len(last) <= self._left_bytes:
                self._left_bytes -= len(block)
                _write(self._file.fileno(), block)
                return
            _write(self._file.fileno(), last)
            log.warning("the record is full and ends here", file=str(self._path))
        except OSError as error:
            log.error("the record ends here", file=str(self._path), error=str(error))
        self._end()

    def _end(self) -> None:
        self._closed = True
        self._file.close()


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
