"""Rounds that other processes disturb, and how that is found out."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfllm_cli.bench.cpu import CpuUse, Process, Snapshot, cpu_use, module_name, server_roots, snapshot, tree
from sfllm_cli.bench.figures import Summary, figures
from sfllm_cli.bench.rounds import Leg, Server, all_rounds, results, undisturbed
from sfllm_cli.bench.sending import Sender
from sfllm_cli.bench.workload import Point
from sfllm_cli.bench_settings import BenchSettings

CALM, POINT = 0.02, Point(concurrency=1)


def leg(others: float, attempt: int = 0) -> Leg:
    use = CpuUse(server=1.0, client=0.1, others=others, machine=1.1 + others)
    return Leg("a", POINT, 1, attempt, figures([]), use, Summary.of([]))


async def legs_of(others: list[float], **settings: int) -> tuple[list[Leg], list[str]]:
    """The legs when attempts see this much of other processes, and what was announced."""
    announced: list[str] = []

    async def run(attempt: int) -> Leg:
        return leg(others[attempt], attempt)

    given = BenchSettings(max_disturbance=0.1, **{"rounds": 5, **settings})
    return await undisturbed(given, run, announced.append), announced


async def test_a_calm_round_is_kept_at_once() -> None:
    legs, announced = await legs_of([CALM])
    assert [(each.kept, each.disturbed) for each in legs] == [(True, False)]
    assert announced == []


async def test_a_disturbed_round_is_dropped_and_repeated() -> None:
    legs, announced = await legs_of([0.5, 0.3, CALM])
    assert [(each.attempt, each.kept) for each in legs] == [(0, False), (1, False), (2, True)]
    assert "other processes used 0.50 cores" in announced[0]
    (medians,) = results(legs)
    assert (len(medians.legs), medians.dropped) == (1, 2)


async def test_of_disturbed_rounds_alone_the_calmest_is_kept_and_marked() -> None:
    legs, _ = await legs_of([0.5, 0.2, 0.3, CALM], max_repeats=2)
    kept = [each for each in legs if each.kept]
    assert [(each.attempt, each.disturbed) for each in kept] == [(1, True)]
    assert len(legs) == 3


async def test_a_single_round_is_never_repeated_but_marked() -> None:
    legs, _ = await legs_of([0.5, CALM], rounds=1)
    assert [(each.kept, each.disturbed) for each in legs] == [(True, True)]


async def test_without_knowing_the_server_no_round_is_dropped() -> None:
    legs, _ = await legs_of([math.nan])
    assert [(each.kept, each.disturbed) for each in legs] == [(True, False)]


def machine(at: float, busy: float, client: float, **own: float) -> Snapshot:
    """A server of a root (10) and a child (11), and a compiler (20) beside them."""
    parents = {10: 1, 11: 10, 20: 1}
    seconds = {10: own.get("root", 0.0), 11: own.get("child", 0.0), 20: own.get("cc", 0.0)}
    names = {10: "serve", 11: "worker", 20: "cc"}
    return Snapshot(at, busy, client, {pid: Process(parents[pid], names[pid], seconds[pid]) for pid in names})


def test_what_neither_server_nor_client_used_was_used_by_others() -> None:
    use = cpu_use(machine(0, 100, 1), machine(10, 115, 2, root=1, child=9, cc=3.5), [10])
    parts = (("worker", 0.9), ("serve", 0.1))
    assert use == CpuUse(server=1.0, client=0.1, others=0.4, machine=1.5, names=("cc 0.35",), parts=parts)
    assert use.disturbed(0.3)
    assert not use.disturbed(0.5)


def test_a_little_work_of_the_kernels_own_threads_is_no_disturbance() -> None:
    def at(seconds: float, busy: float, kernel: float) -> Snapshot:
        threads = {2: Process(0, "kthreadd", 0.0), 3: Process(2, "kdamond.0", kernel)}
        return Snapshot(seconds, busy, 0, {**threads, 10: Process(1, "serve", 0.0)})

    calm = cpu_use(at(0, 0, 0), at(10, 1.2, 0.4), [10])
    assert (calm.others, calm.kernel) == (0.12, 0.04)
    assert not calm.disturbed(0.1)
    # What goes beyond a few percent counts, and so does as much work of anything else.
    assert cpu_use(at(0, 0, 0), at(10, 4, 4), [10]).disturbed(0.1)
    assert cpu_use(at(0, 0, 0), at(10, 1.2, 0), [10]).disturbed(0.1)


def test_an_interpreter_is_named_by_the_package_that_it_runs() -> None:
    assert module_name(["/usr/bin/python3", "-m", "sfllm_gateway.render_process"]) == "sfllm_gateway"
    assert module_name(["/usr/bin/python3", "serve.py", "-m"]) is None
    assert module_name(["grep", "-m", "1", "x"]) is None
    assert module_name([]) is None


async def test_a_server_that_is_done_takes_no_part_in_the_next_rounds() -> None:
    async with aiohttp.ClientSession() as session:
        sender = Sender(session, "http://127.0.0.1:9/v1/completions")
        settings = BenchSettings(rounds=3, requests=1, concurrency=(1,), max_repeats=0)
        servers = [Server(name, "", "m", True, sender, settings) for name in ("a", "b", "c")]

        def after_round(legs: Sequence[Leg]) -> list[str]:
            return {1: ["b"], 2: ["a", "b", "c"]}[legs[-1].round]

        legs = await all_rounds(settings, servers, [POINT], None, lambda: None, lambda _: None, after_round)
    assert [(each.round, each.server) for each in legs] == [(1, "a"), (1, "b"), (1, "c"), (2, "c"), (2, "a")]


def test_time_of_a_child_that_ended_still_counts_for_the_server() -> None:
    before = machine(0, 0, 0, child=50)
    ended = {10: Process(1, "serve", 0.0, ended=55.0)}
    assert cpu_use(before, Snapshot(10, 5, 0, ended), [10]).server == 0.5


def test_others_are_unknown_without_the_processes_of_the_server() -> None:
    assert math.isnan(cpu_use(machine(0, 0, 0), machine(1, 1, 0), []).others)


@given(st.dictionaries(st.integers(1, 40), st.integers(0, 40), max_size=40), st.sets(st.integers(1, 40)))
def test_a_tree_is_closed_under_children_even_when_parents_form_a_circle(
    parents: dict[int, int], roots: set[int]
) -> None:
    state = Snapshot(0, 0, 0, {pid: Process(parent, "p", 0) for pid, parent in parents.items()})
    found = tree(state, roots)
    assert found <= set(parents)
    assert roots & set(parents) - {os.getpid()} <= found
    assert all(pid in found for pid, parent in parents.items() if parent in found and pid != os.getpid())


def test_the_processes_behind_a_port_are_found() -> None:
    listen = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1]); input()"
    with subprocess.Popen(
        [sys.executable, "-uc", listen], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        roots = server_roots(f"http://localhost:{port}")
        server.communicate("\n", timeout=30)
    if sys.platform == "linux":
        assert roots == {server.pid}


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "https://example.org", "http://10.0.0.1:80/v1"])
def test_the_processes_of_a_server_elsewhere_are_unknown(url: str) -> None:
    assert server_roots(url) == frozenset()


def test_work_of_this_process_is_seen_as_the_clients() -> None:
    before = snapshot()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    after = snapshot()
    use = cpu_use(before, after, [])
    assert use.client * (after.at - before.at) >= 0.05
    assert os.getpid() in after.processes
