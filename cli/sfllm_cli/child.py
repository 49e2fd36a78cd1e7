"""One supervised process: its start, its output, its end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping

OUTPUT_LINES_KEPT = 15
_LINE_BYTES = 64 * 2**10
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class ChildSpec:
    """What to run. Children of a lower `stop_rank` are told to stop, and have stopped, first."""

    name: str
    command: tuple[str, ...]
    stop_rank: int = 0
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Child:
    """A running process in its own group, so that Ctrl-C reaches the supervisor alone.

    Owns the process and the pipe of its output from `start` until `wait` has returned.
    Output goes line by line to `write`; the last lines are kept for the report of a death.
    On Linux the kernel sends it SIGTERM when the supervisor dies, however that happens.
    """

    def __init__(
        self, spec: ChildSpec, process: asyncio.subprocess.Process, pipe: int, write: Callable[[bytes], None]
    ) -> None:
        self.spec = spec
        self.started_at = asyncio.get_running_loop().time()
        self.last_lines: deque[bytes] = deque(maxlen=OUTPUT_LINES_KEPT)
        self._process = process
        self._pipe = pipe
        self._write = write
        self._partial = b""
        asyncio.get_running_loop().add_reader(pipe, self._read)

    @classmethod
    async def start(cls, spec: ChildSpec, write: Callable[[bytes], None]) -> Child:
        """Start the process. Raises OSError when the program cannot be run."""
        # A pipe of our own: asyncio's would keep `wait` from returning while a grandchild holds it.
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        try:
            process = await asyncio.create_subprocess_exec(
                *spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                env=dict(spec.environment) or None,
                process_group=0,
                preexec_fn=_die_with_parent(),
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        return cls(spec, process, reading, write)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not been seen to end."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Wait for its end; the exit code, negative for the signal that ended it."""
        code = await self._process.wait()
        while self._pipe >= 0 and self._read():
            pass
        self._close()
        return code

    def terminate(self) -> None:
        """Ask it to finish."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):  # it ended at this very moment
                self._process.terminate()

    def kill(self) -> None:
        """End it and whatever it started, now."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):  # it ended at this very moment
                os.killpg(self.pid, signal.SIGKILL)

    def _read(self) -> bool:
        """Take what the pipe has; False when there is nothing now."""
        try:
            data = os.read(self._pipe, _LINE_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close()
            return False
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > _LINE_BYTES:
            lines, self._partial = [*lines, self._partial], b""
        self._take(lines)
        return True

    def _take(self, lines: list[bytes]) -> None:
        self.last_lines.extend(lines)
        for line in lines:
            self._write(line)

    def _close(self) -> None:
        if self._pipe < 0:
            return
        asyncio.get_running_loop().remove_reader(self._pipe)
        os.close(self._pipe)
        self._pipe = -1
        if self._partial:
            self._take([self._partial])
            self._partial = b""


def _die_with_parent() -> Callable[[], None] | None:
    """A function for the child, between fork and exec, that ties its life to ours; None off Linux."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return tie
