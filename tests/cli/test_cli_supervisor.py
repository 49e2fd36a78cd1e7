"""The supervisor with real processes: small Python programs that die, loop, drain or refuse to."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from sfllm_cli.child import ChildSpec
from sfllm_cli.restarts import RestartPolicy
from sfllm_cli.supervisor import Problem, Supervisor

QUICK = RestartPolicy(crash_limit=3, window_seconds=30, first_delay_seconds=0.01, max_delay_seconds=0.05)
WAIT_SECONDS = 20.0


def python(name: str, code: str, stop_rank: int = 0) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-S", "-u", "-c", code), stop_rank, dict(os.environ))


class Stack:
    """A supervisor that runs in this process, and what its children printed."""

    def __init__(self, *specs: ChildSpec, grace_seconds: float = 10.0, repeat_seconds: float = 0.0) -> None:
        self.lines: list[tuple[str, str]] = []
        self.problem: Problem = "not yet"
        self.ready = asyncio.Event()
        self.changed = asyncio.Event()
        self._others = set(psutil.Process().children())
        self.supervisor = Supervisor(
            specs,
            policy=QUICK,
            probe=self._probe,
            on_ready=self._on_ready,
            write=self._write,
            grace_seconds=grace_seconds,
            repeat_seconds=repeat_seconds,
        )
        self.task = asyncio.create_task(self.supervisor.run())

    async def _probe(self) -> Problem:
        return self.problem

    async def _on_ready(self) -> None:
        self.ready.set()

    def _write(self, name: str, line: bytes) -> None:
        self.lines.append((name, line.decode()))
        self.changed.set()

    def children(self) -> list[psutil.Process]:
        """The processes that it has started and that still run."""
        return [child for child in psutil.Process().children() if child not in self._others]

    async def printed(self, line: str, times: int = 1) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while [text for _, text in self.lines].count(line) < times:
                self.changed.clear()
                await self.changed.wait()

    async def end(self) -> int:
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.task


LOOP = "import time\nprint('up')\ntime.sleep(1000)"
DRAINS = """
import signal, sys, time
def stop(*_):
    print('draining')
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print('up')
time.sleep(1000)
"""
DEAF = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up')\ntime.sleep(1000)"


async def test_a_process_that_dies_after_serving_is_started_again() -> None:
    stack = Stack(python("worker-0", LOOP))
    stack.problem = None
    await stack.printed("up")
    await asyncio.wait_for(stack.ready.wait(), WAIT_SECONDS)
    (child,) = stack.children()
    child.kill()
    await stack.printed("up", times=2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await stack.end() == 0


async def test_a_process_that_an_operator_asks_to_end_is_started_again() -> None:
    stack = Stack(python("gateway-0", DRAINS))
    stack.problem = None
    await stack.printed("up")
    await asyncio.wait_for(stack.ready.wait(), WAIT_SECONDS)
    (child,) = stack.children()
    child.terminate()
    await stack.printed("draining")
    await stack.printed("up", times=2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await stack.end() == 0


async def test_a_process_that_never_gets_going_ends_everything() -> None:
    stack = Stack(python("worker-0", "import sys\nprint('no such file: x')\nsys.exit(1)"), python("gw", LOOP))
    assert await stack.end() == 1
    assert [line for name, line in stack.lines if name == "worker-0"] == ["no such file: x"] * 3
    assert stack.children() == []


async def test_a_process_that_refuses_its_settings_ends_everything_at_once() -> None:
    stack = Stack(python("worker-0", "import sys\nprint('bad flag')\nsys.exit(2)"))
    assert await stack.end() == 1
    assert stack.lines == [("worker-0", "bad flag")]


async def test_sigterm_drains_the_processes_rank_by_rank() -> None:
    stack = Stack(python("scheduler", DRAINS, 2), python("gateway", DRAINS, 0), python("worker", DRAINS, 1))
    await stack.printed("up", times=3)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await stack.end() == 0
    drained = [name for name, line in stack.lines if line == "draining"]
    assert drained == ["gateway", "worker", "scheduler"]


async def test_a_process_that_ignores_sigterm_is_killed_when_the_grace_is_over() -> None:
    stack = Stack(python("worker-0", DEAF), grace_seconds=0.2)
    await stack.printed("up")
    os.kill(os.getpid(), signal.SIGINT)
    assert await stack.end() == 0
    assert stack.children() == []


async def test_a_second_signal_kills_at_once() -> None:
    stack = Stack(python("worker-0", DEAF), grace_seconds=1000)
    await stack.printed("up")
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    assert await stack.end() == 0
    assert stack.children() == []


async def test_a_signal_that_is_sent_twice_at_once_still_drains() -> None:
    stack = Stack(python("worker-0", DRAINS), repeat_seconds=1000)
    await stack.printed("up")
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await stack.end() == 0
    assert stack.lines[-1] == ("worker-0", "draining")


async def test_the_last_line_of_a_process_is_kept_when_it_has_no_newline() -> None:
    stack = Stack(python("worker-0", "import sys\nsys.stdout.write('half a line')\nsys.exit(2)"))
    assert await stack.end() == 1
    assert stack.lines == [("worker-0", "half a line")]


async def test_a_grandchild_that_keeps_the_output_open_does_not_hide_a_death() -> None:
    code = (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(3)'])\nsys.exit(2)"
    )
    stack = Stack(python("worker-0", code))
    started = time.monotonic()
    assert await stack.end() == 1
    assert time.monotonic() - started < 2.9


def test_children_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    driver = f"""
import asyncio, os, sys
from sfllm_cli.child import ChildSpec
from sfllm_cli.restarts import RestartPolicy
from sfllm_cli.supervisor import Supervisor
async def probe(): return "never"
async def ready(): pass
spec = ChildSpec("w", (sys.executable, "-S", "-u", "-c", {LOOP!r}), 0, dict(os.environ))
run = Supervisor([spec], policy=RestartPolicy(), probe=probe, on_ready=ready, grace_seconds=5,
                 write=lambda name, line: print(line.decode(), flush=True)).run
asyncio.run(run())
"""
    with subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        assert b"up\n" in iter(supervisor.stdout.readline, b"")
        children = psutil.Process(supervisor.pid).children()
        assert len(children) == 1
        assert os.getpgid(children[0].pid) != os.getpgid(supervisor.pid)
        supervisor.kill()
        supervisor.wait(WAIT_SECONDS)
        _, alive = psutil.wait_procs(children, timeout=WAIT_SECONDS)
    assert alive == []
