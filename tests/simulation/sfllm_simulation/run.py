"""Runs a script to its end, and says what did not hold."""

from __future__ import annotations

import traceback
from collections import Counter
from functools import partial
from typing import NamedTuple

from sfllm.errors import ErrorCode
from sfllm_gateway.streams import StreamTable

from .faults import over_at, play
from .gateway import Client, Gateway, MakeTable
from .process import InvariantBroken, require
from .script import FAULTS, Script
from .worker import DRAIN_SECONDS, Worker
from .world import BEAT_SECONDS, LEASE_SECONDS, RESTART_SECONDS, World

SLACK_SECONDS = 0.01
WATCH_SECONDS = 0.25


class Failure(NamedTuple):
    """What did not hold, when, and where in the code."""

    kind: str
    time: float
    text: str
    trace: str


class Result(NamedTuple):
    """What came of a run. `slowest` is how long after the last fault (or its opening) a request ended."""

    failure: Failure | None
    outcomes: Counter[str]
    happened: Counter[str]
    tokens: int
    moves: int
    events: int
    slowest: float


def run(script: Script, make_table: MakeTable = StreamTable) -> Result:
    """Play a script. Whatever a machine raises is a failure too."""
    world = None
    try:
        world = World(script, make_table)
        _play(world)
        failure = None
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what a seed found
        kind = error.kind if isinstance(error, InvariantBroken) else type(error).__name__
        now = world.agenda.now if world is not None else 0.0
        failure = Failure(kind, now, str(error), traceback.format_exc())
    clients = [] if world is None else list(world.clients.values())
    return Result(
        failure,
        Counter(client.outcome or "open" for client in clients),
        Counter() if world is None else world.happened,
        sum(len(choice.ids) for c in clients if c.opened for choice in c.opened.stream.choices),
        sum(client.attempts for client in clients),
        0 if world is None else world.agenda.happened,
        max((_took(world, client) for client in clients if client.outcome == "finished"), default=0.0)
        if world is not None
        else 0.0,
    )


def _play(world: World) -> None:
    for event in world.script.events:
        world.agenda.at(event.t, partial(play, world, event))
    last_event = max((event.t for event in world.script.events), default=0.0)
    world.agenda.run(max(last_event, calm_at(world.script)))
    while any(client.outcome is None for client in world.clients.values()):
        world.agenda.run(world.agenda.now + WATCH_SECONDS)
        for client in world.clients.values():
            if client.outcome is None:
                _check_patience(world, client)
    for client in world.clients.values():
        _check_outcome(world, client)
    world.agenda.run(world.agenda.now + 3 * LEASE_SECONDS + DRAIN_SECONDS)
    _check_quiet(world)


def calm_at(script: Script) -> float:
    """When the last fault is over."""
    return max((over_at(event) for event in script.events if isinstance(event, FAULTS)), default=0.0)


def patience(script: Script) -> float:
    """Within so many seconds after the last fault everything that can end has ended.

    A lease until the last loss is noticed, a few beats and repeats until everybody has joined again, and
    the computing: in the worst case one suspect after another, alone, each up to its own crash and back.
    """
    joining = 2 * LEASE_SECONDS + 4 * BEAT_SECONDS + DRAIN_SECONDS
    steps = sum(event.n * (event.tokens + event.prompt // 8) + 4 for event in script.opens)
    poisons = sum(script.poisonous(event.request) for event in script.opens)
    crashes = poisons * (2 + len(script.opens)) * (RESTART_SECONDS + 1.0 + BEAT_SECONDS)
    return joining + crashes + 3 * steps * script.setup.step_milliseconds / 1000


def _took(world: World, client: Client) -> float:
    return client.ended_at - max(calm_at(world.script), client.opened_at or 0.0)


def _check_patience(world: World, client: Client) -> None:
    began = max(calm_at(world.script), client.opened_at or client.asked.t)
    waited = world.agenda.now - began
    bound = patience(world.script)
    require(waited <= bound, "ends in time", f"{client.name} is open {bound:g} s after the last fault")


def _check_outcome(world: World, client: Client) -> None:
    """Finished, or not for one of the few reasons that are allowed."""
    if client.outcome in {"finished", "left", "cut off"}:
        return
    what = f"{client.name} ended with {client.outcome}: {client.error}"
    if client.outcome == ErrorCode.DEADLINE_EXCEEDED:
        assert client.opened_at is not None
        lived = client.ended_at - client.opened_at
        require(lived >= client.asked.deadline - SLACK_SECONDS, "deadlines", f"{what} after {lived:g} s")
        return
    if client.outcome == ErrorCode.ENGINE_FAILURE:
        if world.script.poisonous(client.asked.request):
            return
        assert client.opened is not None
        alone = (world.suspected + Counter(world.scheduler.suspected))[
            client.identity, client.opened.stream.handle
        ]
        require(alone >= 2, "innocents", f"{what}, after {alone} crashes that it may have been the cause of")
        return
    require(False, "errors", what)


def _check_quiet(world: World) -> None:
    """Nothing is left of anything."""
    state = world.scheduler.core.state
    workers = [peer for peer in world.peers.values() if isinstance(peer, Worker)]
    gateways = [peer for peer in world.peers.values() if isinstance(peer, Gateway)]
    for peer, worker in state.workers.items():
        require(not worker.holds, "leaks", f"the scheduler thinks that {peer!r} holds {list(worker.holds)}")
        require(not worker.used_slots and not worker.used_kv_tokens, "leaks", f"credits of {peer!r} are gone")
    for peer, gateway in state.gateways.items():
        require(
            not gateway.requests, "leaks", f"the scheduler thinks that {peer!r} has {list(gateway.requests)}"
        )
    require(not state.waiting_count and not len(state.deadlines), "leaks", "something waits")
    require(not state.recent, "leaks", "what ended is not forgotten")
    for worker_run in workers:
        require(not worker_run.protocol.held_requests, "leaks", f"{worker_run.name} holds something")
    joined = {run.identity for run in workers if run.protocol.lease is not None}
    require(
        joined == {run.identity for run in workers} == set(state.workers),
        "joins",
        f"workers {set(state.workers)}",
    )
    for run in workers:
        require(
            state.workers[run.identity].lease == run.protocol.lease, "joins", f"{run.name} has an old lease"
        )
    known = {run.identity for run in gateways if run.table.connected}
    require(
        known == {run.identity for run in gateways} == set(state.gateways),
        "joins",
        f"gateways {set(state.gateways)}",
    )
    quiet = world.agenda.now - world.scheduler.asked_at
    require(quiet > 2 * BEAT_SECONDS, "digests", f"digests differed {quiet:g} s ago")
