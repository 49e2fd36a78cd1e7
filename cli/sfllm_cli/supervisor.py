"""Keeps a set of processes running: starts, restarts with backoff, gives up, stops in order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import structlog

from sfllm_cli.child import Child, ChildSpec
from sfllm_cli.restarts import GiveUp, RestartHistory, RestartPolicy

_log = structlog.get_logger()

READY_POLL_SECONDS = 0.1
SETTLED_POLL_SECONDS = 2.0
REMINDER_SECONDS = 15.0
KILL_WAIT_SECONDS = 5.0

Problem = str | None
"""Why the stack is not ready, or None when it is."""


class Supervisor:
    """Runs `specs` until a signal comes or one of them cannot be kept alive.

    `probe` says why the stack is not ready (None: it is) and must return soon; `on_ready`
    is called once, when it is. `write` gets every line that the children print, with the
    name of the child. SIGINT, SIGTERM and SIGHUP stop the children in the order of their
    `stop_rank`; after `grace_seconds` in all, or at a second signal, they are killed. A
    signal within `repeat_seconds` is the first one again: `timeout` and some init systems
    signal the process and then its group.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        *,
        policy: RestartPolicy,
        probe: Callable[[], Awaitable[Problem]],
        on_ready: Callable[[], Awaitable[None]],
        write: Callable[[str, bytes], None],
        grace_seconds: float,
        repeat_seconds: float = 0.5,
    ) -> None:
        self._specs = specs
        self._policy = policy
        self._probe = probe
        self._on_ready = on_ready
        self._write = write
        self._grace_seconds = grace_seconds
        self._repeat_seconds = repeat_seconds
        self._signalled_at: float | None = None
        self._children: dict[str, Child] = {}
        self._last_ready_at: float | None = None
        self._failure: str | None = None
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()

    async def run(self) -> int:
        """Run to the end; 0 after a signal and a clean stop, 1 when a process could not be kept alive."""
        with self._signals():
            tasks = [asyncio.create_task(self._keep(spec)) for spec in self._specs]
            watch = asyncio.create_task(self._watch())
            try:
                stopped = asyncio.create_task(self._stop.wait())
                await asyncio.wait([stopped, watch, *tasks], return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._stop.set()
                watch.cancel()
                await self._stop_all()
                outcomes = await asyncio.gather(watch, *tasks, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        if self._failure:
            _log.error(self._failure)
        return 1 if self._failure else 0

    async def _keep(self, spec: ChildSpec) -> None:
        """Keep one process running until the stop."""
        loop = asyncio.get_running_loop()
        history = RestartHistory(self._policy)
        while not self._stop.is_set():
            child = await Child.start(spec, lambda line: self._write(spec.name, line))
            self._children[spec.name] = child
            if self._stop.is_set():  # the stop came while it started, and did not see it
                child.kill()
            _log.debug("started", process=spec.name, pid=child.pid)
            code = await child.wait()
            if self._stop.is_set():
                return
            served = self._last_ready_at is not None and self._last_ready_at > child.started_at
            verdict = history.died(
                loop.time(), lived_seconds=loop.time() - child.started_at, served=served, exit_code=code
            )
            if isinstance(verdict, GiveUp):
                self._fail(child, code, verdict)
                return
            if code == 0:
                _log.info("process ended, starts again", process=spec.name, in_seconds=verdict)
            else:
                _log.warning("process died", process=spec.name, end=_end(code), restart_in_seconds=verdict)
            with contextlib.suppress(TimeoutError):  # no stop came: go on
                await asyncio.wait_for(self._stop.wait(), verdict)

    def _fail(self, child: Child, code: int, verdict: GiveUp) -> None:
        lines = b"\n".join(b"    " + line for line in child.last_lines).decode(errors="replace")
        said = f"; its last lines were:\n{lines}" if lines else ", and printed nothing"
        self._failure = f"{child.spec.name} {verdict.reason} (last: {_end(code)}){said}"
        self._stop.set()

    async def _watch(self) -> None:
        """Follow readiness: closely until ready, and while some process is young."""
        loop = asyncio.get_running_loop()
        remind_at = loop.time() + REMINDER_SECONDS
        announced = False
        while not self._stop.is_set():
            problem = await self._probe()
            if problem is None:
                self._last_ready_at = loop.time()
                if not announced:
                    announced = True
                    await self._on_ready()
            elif not announced and loop.time() >= remind_at:
                _log.info("not ready yet", reason=problem)
                remind_at = loop.time() + REMINDER_SECONDS
            pause = SETTLED_POLL_SECONDS if problem is None else READY_POLL_SECONDS
            with contextlib.suppress(TimeoutError):  # no stop came: go on
                await asyncio.wait_for(self._stop.wait(), pause)

    async def _stop_all(self) -> None:
        """Stop rank after rank, each asked first; whoever is left when time is up is killed."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._grace_seconds
        for rank in sorted({spec.stop_rank for spec in self._specs}):
            children = [child for child in self._running() if child.spec.stop_rank == rank]
            for child in children:
                child.terminate()
            await self._ended(children, deadline - loop.time())
        if left := self._running():
            _log.warning("killing what did not stop", processes=[child.spec.name for child in left])
            for child in left:
                child.kill()
            self._kill.clear()
            await self._ended(left, KILL_WAIT_SECONDS)

    async def _ended(self, children: Sequence[Child], seconds: float) -> None:
        """Wait until `children` have ended, `seconds` passed or a second signal came."""
        if not children or self._kill.is_set():
            return
        waits: list[asyncio.Future[Any]] = [
            asyncio.gather(*(child.wait() for child in children)),
            asyncio.create_task(self._kill.wait()),
        ]
        await asyncio.wait(waits, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    def _running(self) -> list[Child]:
        return [child for child in self._children.values() if child.is_running]

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Take the signals that mean stop."""
        loop = asyncio.get_running_loop()
        taken = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in taken:
            loop.add_signal_handler(number, self._signalled, number)
        try:
            yield
        finally:
            for number in taken:
                loop.remove_signal_handler(number)

    def _signalled(self, number: signal.Signals) -> None:
        now = asyncio.get_running_loop().time()
        if self._signalled_at is not None:
            if now - self._signalled_at >= self._repeat_seconds:
                self._kill.set()
            return
        self._signalled_at = now
        _log.info("stopping; a second signal ends it at once", signal=number.name)
        self._stop.set()


def _end(code: int) -> str:
    """How a process ended, in words."""
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
