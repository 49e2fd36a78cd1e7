"""The invariants of the tables, checked by looking at everything. For tests and idle moments."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import xor

from sfllm.holdings import OpenChoice, digest
from sfllm_scheduler.core.fleet_check import check_fleet
from sfllm_scheduler.core.requests import Request
from sfllm_scheduler.core.state import Model, State
from sfllm_scheduler.core.suspects import group_cap
from sfllm_scheduler.core.waiting_check import check_waiting
from sfllm_scheduler.core.workers import HoldKey, InvariantError, Worker


def check_integrity(state: State) -> None:
    """Raise `InvariantError` for the first contradiction between the tables."""
    live = [request for gateway in state.gateways.values() for request in gateway.requests.values()]
    waiting = [request for request in live if request.worker is None]
    queued = sum(len(model.waiting) for model in state.models.values())
    _require(len(waiting) == queued == state.waiting_count, "the queue and the gateways' tables differ")
    _require(len(state.deadlines) == len(live), "a deadline is missing or too many")
    for request in waiting:
        _require(request in state.models[request.model].waiting, f"{request.key} waits nowhere")
    for request in live:
        if request.worker is not None:
            holds = state.workers[request.worker].holds
            hold = holds.get(HoldKey(request.key, request.submit.attempt))
            _require(hold is not None and hold.request is request, f"{request.key} is held by nobody")
        _check_choices(request)
    for gateway in state.gateways.values():
        held = _digest(gateway.requests.values())
        _require(gateway.digest == held, f"{gateway.peer.hex()}: the digest is wrong")
    for worker in state.workers.values():
        _check_worker(state, worker)
    for model in state.models.values():
        _check_model(model)


def _check_worker(state: State, worker: Worker) -> None:
    name = worker.worker_id
    holds = worker.holds.values()
    _require(worker.used_slots == sum(hold.slots for hold in holds), f"{name}: slots do not add up")
    _require(worker.used_kv_tokens == sum(hold.kv_tokens for hold in holds), f"{name}: cache does not add up")
    held = _digest(hold.request for hold in holds)
    _require(worker.digest == held, f"{name}: the digest is wrong")
    _require(worker.free_kv_tokens >= 0, f"{name}: over capacity")
    charged = sum(hold.prefill_tokens for hold in holds)
    _require(0 <= worker.prefill.tokens <= charged, f"{name}: outstanding prefill of what it does not hold")
    _require(worker.prefill.charged == charged, f"{name}: prefill does not add up")
    sizes = {trial.group_size for trial in worker.probation.values()}
    _require(len(sizes) < 2, f"{name}: suspects of different crashes together")
    _require(all(len(worker.probation) <= group_cap(size) for size in sizes), f"{name}: too many suspects")
    _require(worker.probation.keys() <= worker.holds.keys(), f"{name}: a trial of what is not held")
    for key, hold in worker.holds.items():
        _require(state.find(key.key) is hold.request, f"{name} holds {key}, which is not live")


def _check_choices(request: Request) -> None:
    """What is open, and whether the fingerprints are kept right."""
    _require(bool(request.open), f"nothing of {request.key} is open")
    _require(request.mark == _digest([request]), f"{request.key}: the mark is wrong")
    for choice, fingerprint in request.open.items():
        name = OpenChoice(*request.key, request.submit.attempt, choice)
        _require(fingerprint == digest([name]), f"{name}: the fingerprint is wrong")


def _digest(requests: Iterable[Request]) -> int:
    return reduce(xor, (mark for request in requests for mark in request.open.values()), 0)


def _check_model(model: Model) -> None:
    name = model.card.name
    _require((model.workerless_since is None) == bool(model.fleet.serving), f"{name}: workerless or not?")
    check_waiting(name, model.waiting)
    check_fleet(name, model.fleet)


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise InvariantError(text)
