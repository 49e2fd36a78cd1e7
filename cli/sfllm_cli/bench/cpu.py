"""Who used the CPU during a round: the server, this client, or other processes that disturbed it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

NAMED_PROCESSES = 3
KERNEL_ALLOWANCE = 0.05
"""Cores that the kernel's own threads may use, as they always do, before they count as a disturbance."""

_KERNEL_PARENT = "kthreadd"
_THIS_MACHINE = ("127.0.0.1", "::1", "localhost", "0.0.0.0")


class Process(NamedTuple):
    """One process at one moment: CPU seconds of its own, and of children that have ended."""

    parent: int
    name: str
    own: float
    ended: float = 0.0


class Snapshot(NamedTuple):
    """The machine at one moment. `busy` is CPU seconds of all processes, and stolen ones."""

    at: float
    busy: float
    client: float
    processes: Mapping[int, Process]


class CpuUse(NamedTuple):
    """Mean CPU cores in use over a round; `others` is NaN when the server's processes are unknown.

    `kernel` is the part of `others` that is the kernel's own threads. `parts` are the server's
    cores by the name of the process, and `names` the busiest others as text.
    """

    server: float
    client: float
    others: float
    machine: float
    names: tuple[str, ...] = ()
    kernel: float = 0.0
    parts: tuple[tuple[str, float], ...] = ()

    def disturbed(self, limit: float) -> bool:
        """Whether other processes used more than `limit` cores; False when unknown."""
        return self.others - min(self.kernel, KERNEL_ALLOWANCE) > limit


def snapshot() -> Snapshot:
    """The machine now."""
    processes = {}
    for process in psutil.process_iter(["ppid", "name", "cmdline", "cpu_times"]):
        times = process.info["cpu_times"]
        if times is not None:
            processes[process.pid] = Process(
                process.info["ppid"] or 0,
                module_name(process.info["cmdline"] or ()) or process.info["name"] or "?",
                times.user + times.system,
                times.children_user + times.children_system,
            )
    machine = psutil.cpu_times()
    stolen = getattr(machine, "steal", 0.0)
    return Snapshot(
        time.perf_counter(),
        machine.user + machine.system + getattr(machine, "nice", 0.0) + stolen,
        time.process_time(),
        processes,
    )


def module_name(command: Sequence[str]) -> str | None:
    """The package that a Python interpreter runs (`-m package.module`): all interpreters are named alike."""
    flags = list(command[1:3])
    if len(flags) == 2 and flags[0] == "-m" and "python" in command[0]:
        return flags[1].partition(".")[0]
    return None


def cpu_use(before: Snapshot, after: Snapshot, roots: Iterable[int]) -> CpuUse:
    """What was used between two snapshots, with the server's processes below `roots`.

    Others are the machine's busy time less the server's and the client's, so that processes which
    came and went in between count too.
    """
    seconds = after.at - before.at
    server_pids = tree(before, roots) | tree(after, roots)
    server = _seconds(after, server_pids) - _seconds(before, server_pids)
    client = after.client - before.client
    machine = after.busy - before.busy
    rest = server_pids | {os.getpid()}
    return CpuUse(
        server=server / seconds,
        client=client / seconds,
        others=max(0.0, machine - server - client) / seconds if server_pids else float("nan"),
        machine=machine / seconds,
        names=_busiest(_used(before, after, set(after.processes) - rest), seconds),
        kernel=sum(_used(before, after, _kernel_threads(after)).values()) / seconds,
        parts=tuple((name, used / seconds) for name, used in _used(before, after, server_pids).items()),
    )


def tree(state: Snapshot, roots: Iterable[int]) -> set[int]:
    """The processes `roots` and all below them that live."""
    children: dict[int, list[int]] = {}
    for pid, process in state.processes.items():
        children.setdefault(process.parent, []).append(pid)
    found: set[int] = set()
    waiting = [pid for pid in roots if pid in state.processes]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, [])
    # The client may have started the server, but is no part of it.
    return found - {os.getpid()}


def server_roots(url: str) -> frozenset[int]:
    """The processes that serve `url`; empty when it is not on this machine, or they cannot be seen.

    Whoever listens on the port, and from there up while the parent runs the same program: a
    gateway's supervisor is part of the server, the shell that started it is not.
    """
    address = urlsplit(url)
    if address.hostname not in _THIS_MACHINE:
        return frozenset()
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        listening = {
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
            and connection.laddr
            and connection.laddr.port == port
            and connection.pid
        }
        return frozenset(_top(pid) for pid in listening)
    except psutil.Error:
        return frozenset()


def _top(pid: int) -> int:
    process = psutil.Process(pid)
    while True:
        parent = process.parent()
        if parent is None or parent.pid in (1, os.getpid()) or parent.exe() != process.exe():
            return process.pid
        process = parent


def _seconds(state: Snapshot, pids: set[int]) -> float:
    known = [state.processes[pid] for pid in pids if pid in state.processes]
    # With its ended children, a tree's total never falls when a process ends.
    return sum(process.own + process.ended for process in known)


def _used(before: Snapshot, after: Snapshot, pids: set[int]) -> dict[str, float]:
    """CPU seconds between the snapshots of those processes that still live, by name, the most first."""
    used: dict[str, float] = {}
    for pid in pids & set(after.processes):
        process, earlier = after.processes[pid], before.processes.get(pid)
        used[process.name] = used.get(process.name, 0.0) + process.own - (earlier.own if earlier else 0.0)
    return dict(sorted(used.items(), key=lambda item: (-item[1], item[0])))


def _kernel_threads(state: Snapshot) -> set[int]:
    roots = {pid for pid, process in state.processes.items() if process.name == _KERNEL_PARENT}
    return {pid for pid, process in state.processes.items() if pid in roots or process.parent in roots}


def _busiest(used: Mapping[str, float], seconds: float) -> tuple[str, ...]:
    """The names of the busiest processes, with the cores that they used."""
    shares = [(name, share / seconds) for name, share in used.items()][:NAMED_PROCESSES]
    return tuple(f"{name} {share:.2f}" for name, share in shares if share >= 0.01)
