"""What must hold at the end: everything has ended, for a reason that is allowed, and nothing is left of it.

What must hold all the time is checked where it happens: by clients, workers and the scheduler's core.
"""

from __future__ import annotations

from math import ceil, log2

from sfllm.errors import ErrorCode
from sfllm_scheduler.core.expiry import SLACK_ENTRIES

from .faults import over_at
from .gateway import Client, Gateway
from .model import BEAT_SECONDS, BLOCK_TOKENS, LEASE_SECONDS
from .process import require
from .script import FAULTS, Drain, Script
from .worker import DRAIN_SECONDS, Worker
from .world import RESTART_SECONDS, World

EARLY_SECONDS = 0.01
"""Deadlines travel in whole milliseconds."""

WITHOUT_ERROR = {"finished", "left", "cut off"}


def calm_at(script: Script) -> float:
    """When the last fault is over."""
    return max((over_at(event) for event in script.events if isinstance(event, FAULTS)), default=0.0)


def patience(script: Script) -> float:
    """Within so many seconds after the last fault everything that can end has ended.

    Two leases and two beats until every loss was noticed and everybody has joined again (and as long as a
    drain may take), the computing, at worst of one request after another, and, with poison, the crashes: each
    poison takes those by which halving finds it, and one more than that alone.
    """
    drain = DRAIN_SECONDS if any(isinstance(event, Drain) for event in script.events) else 0.0
    joining = 2 * LEASE_SECONDS + 2 * BEAT_SECONDS + drain
    steps = sum(event.n * (event.tokens + event.prompt // BLOCK_TOKENS) + 4 for event in script.opens)
    poisons = sum(script.poisonous(event.request) for event in script.opens)
    crashes = poisons * (2 * ceil(log2(len(script.opens) + 1)) + 3)
    crash_seconds = RESTART_SECONDS + BEAT_SECONDS + 1.0
    return joining + crashes * crash_seconds + steps * script.setup.step_milliseconds / 1000


def check_patience(world: World) -> None:
    """No request is open for longer than it may be."""
    bound, calm = patience(world.script), calm_at(world.script)
    for client in world.clients.values():
        if client.outcome is None:
            waited = world.agenda.now - max(calm, client.opened_at or client.asked.t)
            text = f"{client.name} is open {waited:.2f} s after the last fault, and {bound:.2f} s are enough"
            require(waited <= bound, "ends in time", text)


def check_let_go(world: World) -> None:
    """What has ended for its client is soon nowhere any more.

    Without faults a cancel takes effect with the next steps. After faults a beat shows what was lost, a
    list says what it was, and a cancel that was lost too is repeated with the next beat.
    """
    step = world.script.setup.step_milliseconds / 1000
    calm = calm_at(world.script)
    started = [event.t for event in world.script.events if isinstance(event, FAULTS)]
    faultless = all(t > world.agenda.now for t in started) and not world.happened["worker left"]
    for client in world.clients.values():
        if client.outcome is None or client.opened is None:
            continue
        patience = 2 * step + 0.1 if faultless else 2 * LEASE_SECONDS + 2 * BEAT_SECONDS + step
        if world.agenda.now < (client.ended_at if faultless else max(client.ended_at, calm)) + patience:
            continue
        for peer in world.peers.values():
            if isinstance(peer, Worker) and peer.alive:
                held = peer.holds(client.identity, client.opened.stream.handle)
                require(not held, "lets go", f"{peer.name} still has {client.name}, which has ended")


def check_outcome(world: World, client: Client) -> None:
    """It finished, or it did not for one of the few reasons that are allowed."""
    if client.outcome in WITHOUT_ERROR:
        return
    what = f"{client.name} ended with {client.outcome} ({client.error})"
    if client.outcome == ErrorCode.DEADLINE_EXCEEDED:
        assert client.opened_at is not None
        lived = client.ended_at - client.opened_at
        in_time = lived >= client.asked.deadline - EARLY_SECONDS
        require(in_time, "deadlines", f"{what} after {lived:.3f} of {client.asked.deadline:g} s")
    elif client.outcome == ErrorCode.ENGINE_FAILURE:
        require(
            f"request r{client.asked.request} " in f"{client.error} ", "errors", f"{what}, without its id"
        )
        if not world.script.poisonous(client.asked.request):
            require(
                client.seems_poisonous, "innocents", f"{what}, and was not alone at two losses of workers"
            )
    else:
        require(False, "errors", what)


def check_quiet(world: World) -> None:
    """A while after everything ended nothing is left of it, and everybody knows everybody."""
    _check_scheduler(world)
    for peer in world.peers.values():
        if isinstance(peer, Gateway):
            _check_gateway(world, peer)
        else:
            _check_worker(world, peer)
    state = world.scheduler.core.state
    there = {peer.identity for peer in world.peers.values()}
    known = set(state.workers) | set(state.gateways)
    require(known == there, "joins", f"{sorted(there)} are there, the scheduler knows {sorted(known)}")
    quiet = world.agenda.now - world.scheduler.asked_at
    require(quiet > 2 * BEAT_SECONDS, "digests", f"the scheduler asked for a list {quiet:.2f} s ago")


def _check_scheduler(world: World) -> None:
    state = world.scheduler.core.state
    for identity, worker in state.workers.items():
        name = identity.decode()
        require(not worker.holds, "leaks", f"the scheduler thinks that {name} holds {list(worker.holds)}")
        require(not worker.used_slots and not worker.used_kv_tokens, "leaks", f"credits of {name} are gone")
        require(not worker.digest, "leaks", f"the scheduler's digest of {name}")
    for identity, gateway in state.gateways.items():
        left = list(gateway.requests)
        require(not left, "leaks", f"the scheduler thinks that {identity.decode()} has {left}")
    require(not state.waiting_count, "leaks", f"{state.waiting_count} requests wait")
    require(not len(state.deadlines), "leaks", f"{len(state.deadlines)} deadlines")
    require(state.deadlines.stored <= SLACK_ENTRIES, "leaks", f"{state.deadlines.stored} dead deadlines")
    require(not state.recent, "leaks", f"{len(state.recent)} requests that ended are not forgotten")


def _check_gateway(world: World, gateway: Gateway) -> None:
    require(gateway.table.connected, "joins", f"{gateway.name} has no scheduler")
    require(not gateway.clients, "leaks", f"{gateway.name} has clients")
    left = list(gateway.table._streams)
    require(not left, "leaks", f"{gateway.name} has streams {left}")
    _check_outbox(world, gateway)


def _check_worker(world: World, worker: Worker) -> None:
    known = world.scheduler.core.state.workers.get(worker.identity)
    lease = known.lease if known is not None else None
    own = worker.protocol.lease
    require(own is not None and own == lease, "joins", f"{worker.name} has lease {own}, but {lease} is valid")
    require(not worker.protocol.held_requests, "leaks", f"{worker.name} holds requests")
    require(not worker.protocol.digest, "leaks", f"the digest of {worker.name}")
    require(not worker.engine.has_work, "leaks", f"{worker.name} computes something")
    _check_outbox(world, worker)


def _check_outbox(world: World, peer: Gateway | Worker) -> None:
    waiting = len(world.links[peer.name].outbox)
    require(not waiting, "leaks", f"{waiting} messages wait in the outbox of {peer.name}")
