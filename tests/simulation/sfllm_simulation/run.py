"""Runs a script to its end, and says what did not hold."""

from __future__ import annotations

import traceback
from collections import Counter
from functools import partial
from typing import NamedTuple

from sfllm_gateway.streams import StreamTable

from .checks import calm_at, check_let_go, check_outcome, check_patience, check_quiet
from .faults import play
from .gateway import Client, MakeTable
from .model import LEASE_SECONDS
from .process import InvariantBroken
from .script import Script
from .worker import DRAIN_SECONDS
from .world import World

WATCH_SECONDS = 0.25
QUIET_SECONDS = 3 * LEASE_SECONDS + DRAIN_SECONDS
"""What ended is remembered for two leases."""


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
    world = World(script, make_table)
    try:
        _play(world)
        failure = None
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the script found
        kind = error.kind if isinstance(error, InvariantBroken) else type(error).__name__
        failure = Failure(kind, world.agenda.now, str(error), traceback.format_exc())
    clients = world.clients.values()
    took = [_took(script, client) for client in clients if client.outcome == "finished"]
    return Result(
        failure=failure,
        outcomes=Counter(client.outcome or "open" for client in clients),
        happened=world.happened,
        tokens=sum(client.tokens for client in clients),
        moves=sum(client.attempts for client in clients),
        events=world.agenda.happened,
        slowest=max(took, default=0.0),
    )


def _play(world: World) -> None:
    script, agenda = world.script, world.agenda
    for event in script.events:
        agenda.at(event.t, partial(play, world, event))
    last_event = max((event.t for event in script.events), default=0.0)
    begun = max(last_event, calm_at(script))
    while agenda.now < begun or any(client.outcome is None for client in world.clients.values()):
        agenda.run(agenda.now + WATCH_SECONDS)
        check_patience(world)
        check_let_go(world)
    for client in world.clients.values():
        check_outcome(world, client)
    agenda.run(agenda.now + QUIET_SECONDS)
    check_quiet(world)


def _took(script: Script, client: Client) -> float:
    return client.ended_at - max(calm_at(script), client.opened_at or 0.0)
