"""Who is there: hellos, beats, leases, silence and loss of gateways and workers.

Every welcome of a worker makes a new lease; what was held under the older one is gone,
and messages that still carry it are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

from sfllm.messages import (
    Drain,
    GatewayWelcome,
    ModelCard,
    SchedulerBeat,
    WorkerHello,
    WorkerUnknown,
    WorkerWelcome,
)
from sfllm_scheduler.core import suspects
from sfllm_scheduler.core.cohorts import POLICIES
from sfllm_scheduler.core.endings import interrupt
from sfllm_scheduler.core.events import ForgetGateway, ForgetWorker, NeedAssets, ToGateway, ToWorker
from sfllm_scheduler.core.state import Gateway, Model, State
from sfllm_scheduler.core.workers import HoldKey, Worker

MAX_FAILURE_CHARACTERS = 500
CRASHES = frozenset({"unreachable", "silent", "failed"})
"""Causes of a worker's loss that something which it ran may have brought about."""


def gateway_hello(state: State, peer: bytes, now: float) -> None:
    """Open the link of a gateway. A repeated hello means that it starts over."""
    known = state.gateways.get(peer)
    if known is None:
        state.gateways[peer] = Gateway(peer, now)
        state.record("gateway_joined", gateway=peer.decode("ascii", "replace"))
    policy = state.policy
    state.to_gateway(peer, GatewayWelcome(state.epoch, policy.beat_seconds, policy.lease_seconds))
    state.to_gateway(peer, state.models_message())
    if known is not None:
        known.heard = now
        for request in list(known.requests.values()):
            interrupt(state, request, "gateway_reconnected", "", now)


def gateway_lost(state: State, peer: bytes, cause: str, now: float) -> None:
    """Forget a gateway and cancel what it had."""
    gateway = state.gateways.get(peer)
    if gateway is None:
        return
    for request in list(gateway.requests.values()):
        state.end(request, now)
    del state.gateways[peer]
    state.emit(ForgetGateway(peer))
    state.record("gateway_lost", gateway=peer.decode("ascii", "replace"), cause=cause)


def worker_hello(state: State, peer: bytes, message: WorkerHello, now: float) -> None:
    """Give a worker a new lease; interrupt what it held under the older one."""
    capacity = message.capacity
    if min(capacity.slots, capacity.kv_tokens, capacity.step_tokens) < 1 or message.card.max_model_len < 2:
        state.record("malformed", link="worker", peer=peer.decode("ascii", "replace"), error="no capacity")
        return
    known = state.workers.get(peer)
    if known is not None:
        _remove_worker(state, known, "worker_rejoined", now)
    worker = Worker(peer, message.worker_id, message.card, capacity, now)
    state.last_lease += 1
    worker.lease = state.last_lease
    state.workers[peer] = worker
    policy = state.policy
    welcome = WorkerWelcome(
        state.epoch,
        worker.lease,
        policy.beat_seconds,
        policy.lease_seconds,
        POLICIES[policy.policy].shortest_first,
    )
    state.emit(ToWorker(peer, welcome))
    model = _model_for(state, message.card, now)
    if model is None:
        worker.draining = True
        state.emit(ToWorker(peer, Drain(worker.lease)))
        state.record("worker_refused", worker=worker.worker_id, model=message.card.name)
        return
    model.fleet.join(worker)
    model.fleet.look_again()  # with more workers each request may be passed more often
    model.backlog.reset()
    model.workerless_since = None
    model.recheck_at = now + policy.worker_wait_seconds
    model.may_grant = True
    state.emit(NeedAssets(peer, message.card))
    state.record("worker_joined", worker=worker.worker_id, model=message.card.name, lease=worker.lease)
    state.announce_models()


def answer_stray_beat(state: State, peer: bytes, now: float) -> None:
    """A beat without a valid lease: what that worker holds is not known here, and it should start over.

    Unless a welcome was sent a moment ago: then that is under way.
    """
    worker = state.workers.get(peer)
    if worker is None or now - worker.joined >= state.policy.beat_seconds:
        state.emit(ToWorker(peer, WorkerUnknown(state.epoch)))


def worker_bye(state: State, worker: Worker, failure: str, now: float) -> None:
    """A worker leaves: it was drained, or `failure` says what broke it."""
    if failure:
        state.record("worker_failed", worker=worker.worker_id, failure=failure[:MAX_FAILURE_CHARACTERS])
    worker_lost(state, worker.peer, "failed" if failure else "drain", now)


def worker_draining(state: State, worker: Worker, now: float) -> None:
    """Grant this worker nothing more."""
    if worker.draining:
        return
    worker.draining = True
    state.worker_changed(worker)
    state.record("worker_draining", worker=worker.worker_id)
    _after_leaving(state, worker, now)


def worker_lost(state: State, peer: bytes, cause: str, now: float) -> None:
    """Forget a worker; what it held can be submitted again. `CRASHES` make suspects of that."""
    worker = state.workers.get(peer)
    if worker is None:
        return
    _remove_worker(state, worker, cause, now)
    state.emit(ForgetWorker(peer))
    state.record("worker_lost", worker=worker.worker_id, cause=cause)


def send_beats(state: State, now: float) -> None:
    """Beat to everybody, when it is time. Gateways get the models again: the last list may be lost."""
    if now < state.next_beat:
        return
    state.next_beat = now + state.policy.beat_seconds
    beat, models = SchedulerBeat(state.epoch), state.models_message()
    for peer in state.gateways:
        state.emit(ToGateway(peer, beat))
        state.emit(ToGateway(peer, models))
    for peer in state.workers:
        state.emit(ToWorker(peer, beat))


def sweep(state: State, now: float) -> None:
    """Forget who has been silent for a lease, and what ended a while ago; look after suspects."""
    if now < state.next_sweep:
        return
    lease = state.policy.lease_seconds
    if now - state.next_sweep > lease / 2:
        _excuse_silence(state, now)
    state.next_sweep = now + min(lease, state.policy.beat_seconds) / 4
    for peer in [peer for peer, worker in state.workers.items() if now - worker.heard > lease]:
        worker_lost(state, peer, "silent", now)
    for peer in [peer for peer, gateway in state.gateways.items() if now - gateway.heard > lease]:
        gateway_lost(state, peer, "silent", now)
    while state.recent and next(iter(state.recent.values())).forget_at <= now:
        state.recent.popitem(last=False)
    for worker in state.workers.values():
        if worker.probation or worker.reserved is not None:
            _look_after_suspects(state, worker, now)
    for model in state.models.values():
        if model.waiting:
            model.fleet.look_again()
            model.may_grant = True


def _excuse_silence(state: State, now: float) -> None:
    """Start counting anew: the scheduler was stopped itself, and what came meanwhile is not read yet."""
    for worker in state.workers.values():
        worker.heard = now
    for gateway in state.gateways.values():
        gateway.heard = now


def _look_after_suspects(state: State, worker: Worker, now: float) -> None:
    """Clear suspects that have run for long enough, and make room for one that must be alone."""
    if suspects.clear_by_time(worker, now):
        state.worker_changed(worker)
    waits = worker.reserved is not None and state.find(worker.reserved.key) is worker.reserved
    if waits and suspects.must_be_emptied(worker, now):
        for key, hold in list(worker.holds.items()):
            if key in worker.holds:
                interrupt(state, hold.request, "moved", worker.worker_id, now)


def _remove_worker(state: State, worker: Worker, cause: str, now: float) -> None:
    _interrupt_held(state, worker, cause, now, suspects.blame(worker) if cause in CRASHES else {})
    del state.workers[worker.peer]
    model = state.models.get(worker.card.name)
    if model is not None and model.fleet.leave(worker):
        _after_leaving(state, worker, now)
        model.recheck_at = now + state.policy.worker_wait_seconds


def _after_leaving(state: State, worker: Worker, now: float) -> None:
    """Its model has a worker less that takes requests."""
    model = state.models.get(worker.card.name)
    if model is not None:
        model.backlog.reset()
        if model.workerless_since is None and not model.fleet.serving:
            model.workerless_since = now
    state.announce_models()


def _interrupt_held(
    state: State, worker: Worker, cause: str, now: float, blamed: Mapping[HoldKey, int]
) -> None:
    """End all that a worker holds and take its credits back: it has none of it any more."""
    for key in list(worker.holds):
        request = state.release(worker, key)
        interrupt(state, request, cause, worker.worker_id, now, blamed.get(key, 0))


def _model_for(state: State, card: ModelCard, now: float) -> Model | None:
    """The model's entry, made or updated; None when live workers serve other content by that name."""
    model = state.models.get(card.name)
    if model is None:
        return state.add_model(card, now)
    model.expected = False
    if model.card != card:
        same_content = model.card.content == card.content
        if model.workers and not same_content:
            return None
        model.card = card
        model.assets_ready = not card.assets or (model.assets_ready and same_content)
    return model
