"""One service of the fleet: a child process that is started again whenever it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from chaos.http_client import Address, get
from chaos.relay import Relay
from sfllm_cli.child import Child, ChildSpec
from sfllm_cli.restarts import GiveUp, RestartHistory, RestartPolicy

POLICY = RestartPolicy(
    crash_limit=10, first_delay_seconds=0.1, max_delay_seconds=2.0, max_delay_after_serving_seconds=0.2
)
"""In a hurry: a run should be long because much happens in it."""

KILL_SECONDS = 10.0


class End(NamedTuple):
    """How a life of a service ended: at which time (monotonic), with what code, and what was done to it."""

    at: float
    code: int
    done: str

    @property
    def was_expected(self) -> bool:
        """Whether it ended as it should have after what was done: 0 when asked, the signal when killed."""
        return self.code == {"killed": -signal.SIGKILL, "asked to stop": 0}.get(self.done)


class Deed(NamedTuple):
    """What was done to a service, and when (monotonic)."""

    at: float
    done: str


class Service:
    """Owns the process from `start` to `close`; `relays` are its ways to the scheduler."""

    def __init__(
        self, spec: ChildSpec, kind: str, admin: Address, log: Path, relays: tuple[Relay, ...]
    ) -> None:
        self.spec = spec
        self.name = spec.name
        self.kind = kind
        self.admin = admin
        self.relays = relays
        self.ends: list[End] = []
        self.deeds: list[Deed] = []
        self.failure: str | None = None
        self._log = log.open("ab", buffering=0)
        self._child: Child | None = None
        self._done = ""
        self._keeper: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Start it, and start it again whenever it ends."""
        self._keeper = asyncio.create_task(self._keep())

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._child.pid if self._child is not None and self._child.is_running else None

    @property
    def lives(self) -> int:
        """How many lives have ended."""
        return len(self.ends)

    @property
    def is_leaving(self) -> bool:
        """Whether it was asked to stop, or killed, and has not ended yet."""
        return bool(self._done)

    def was_killed_since(self, moment: float) -> bool:
        """Whether it was killed after `moment`."""
        return any(deed.done == "killed" and deed.at >= moment for deed in self.deeds)

    def left_since(self, moment: float) -> bool:
        """Whether it is leaving, or some life of it ended after `moment`."""
        return self.is_leaving or any(end.at >= moment for end in self.ends)

    async def answers(self, path: str = "/health") -> bool:
        """Whether its admin port answers 200 now."""
        try:
            return (await get(self.admin, path))[0] == 200
        except (OSError, TimeoutError):
            return False

    def kill(self) -> bool:
        """SIGKILL; False when nothing runs."""
        return self._signal(signal.SIGKILL, "killed")

    def terminate(self) -> bool:
        """SIGTERM: it should drain and end with code 0."""
        return self._signal(signal.SIGTERM, "asked to stop")

    def pause(self) -> bool:
        """SIGSTOP."""
        return self._signal(signal.SIGSTOP, self._done)

    def resume(self) -> bool:
        """SIGCONT."""
        return self._signal(signal.SIGCONT, self._done)

    async def ended(self, lives: int, seconds: float) -> bool:
        """Wait until more than `lives` lives have ended; False when that takes too long."""
        return await self._wait(lambda: self.lives > lives, seconds)

    async def started(self, seconds: float) -> bool:
        """Wait until a process runs; False when that takes too long."""
        return await self._wait(lambda: self.pid is not None, seconds)

    async def stop(self, seconds: float) -> int | None:
        """Ask it to stop and do not start it again; its exit code, None when it had to be killed."""
        lives, runs = self.lives, self.pid is not None
        if self._keeper is not None and not runs:
            self._keeper.cancel()
        elif self._keeper is not None:
            self._done = "asked to stop for good"
            assert self._child is not None
            self._child.terminate()
            if not await self.ended(lives, seconds):
                return None
            await asyncio.wait([self._keeper])
        return self.ends[-1].code if runs else 0

    async def close(self) -> None:
        """Kill what runs and wait for its end."""
        try:
            if self._keeper is not None:
                self._keeper.cancel()
                await asyncio.gather(self._keeper, return_exceptions=True)
            if self._child is not None:
                self._child.kill()
                async with asyncio.timeout(KILL_SECONDS):
                    await self._child.wait()
        finally:
            self._log.close()

    def _signal(self, number: signal.Signals, done: str) -> bool:
        if self.pid is None:
            return False
        self._done = done
        self.deeds.append(Deed(time.monotonic(), done or number.name))
        os.kill(self.pid, number)
        return True

    async def _keep(self) -> None:
        history = RestartHistory(POLICY)
        while True:
            self._done = ""
            child = self._child = await Child.start(self.spec, self._write)
            self._announce()
            code = await child.wait()
            self.ends.append(End(time.monotonic(), code, self._done))
            self._announce()
            if self._done == "asked to stop for good":
                return
            lived = asyncio.get_running_loop().time() - child.started_at
            verdict = history.died(
                time.monotonic(), lived_seconds=lived, served=bool(self._done), exit_code=code
            )
            if isinstance(verdict, GiveUp):
                self.failure = f"{self.name} {verdict.reason} (exit code {code})"
                return
            await asyncio.sleep(verdict)

    def _write(self, line: bytes) -> None:
        self._log.write(line + b"\n")

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True
