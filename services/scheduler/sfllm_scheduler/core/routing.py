"""Granting: which worker gets the next cohort, and the message that hands it over."""

from __future__ import annotations

from array import array
from functools import partial

from sfllm.messages import Grant, GrantedRequest
from sfllm.wire import Array
from sfllm_scheduler.core import suspects
from sfllm_scheduler.core.cohorts import LOOK_AHEAD, POLICIES, Room
from sfllm_scheduler.core.events import ToWorker
from sfllm_scheduler.core.fleet import PROBES
from sfllm_scheduler.core.requests import Request
from sfllm_scheduler.core.state import Model, State
from sfllm_scheduler.core.workers import Worker


def grant_all(state: State, now: float) -> None:
    """Grant what can be granted. Afterwards no worker idles while a request that it could run waits.

    The exception: a worker with suspects on trial, or kept free for one, gets nothing else for some seconds.
    """
    for model in state.models.values():
        if not model.may_grant:
            continue
        model.may_grant = False
        waited = len(model.waiting)
        _end_reservations(model)
        if model.waiting.suspects:
            _grant_suspects(state, model, now)
            _end_reservations(model)
        _grant_ordinary(state, model, now)
        model.backlog.note(waited - len(model.waiting), len(model.waiting), now)


def _grant_suspects(state: State, model: Model, now: float) -> None:
    """Suspects go first: they ran before, and few of them can go at a time."""
    left = 0
    for request in list(model.waiting.suspects):
        if request.worker is not None:
            continue  # it went with an earlier one
        worker = suspects.place(model.fleet, request)
        if worker is not None:
            _grant(state, model, worker, suspects.group(worker, request, model.waiting.suspects), now)
            continue
        suspects.reserve(model.fleet, request, now)
        left += 1
        if left > LOOK_AHEAD:
            break


def _end_reservations(model: Model) -> None:
    """Open workers that were kept free for a suspect which does not wait any more."""
    for worker in list(model.fleet.special.values()):
        if worker.reserved is not None and (worker.draining or worker.reserved not in model.waiting):
            worker.reserved = None
            model.fleet.update(worker)


def _grant_ordinary(state: State, model: Model, now: float) -> None:
    """Grant until nothing that waits fits any worker. Retried requests look for another worker first."""
    fleet = model.fleet
    if not fleet.any_place:
        return
    tried: set[int] = set()
    last_resorts: list[Worker] = []
    while model.waiting.ordinary_count and (worker := _next_worker(state, model, tried, now)):
        room = _room(model, worker, avoid=True)
        if not _grant_cohort(state, model, room, now):
            tried.add(worker.lease)
            fleet.set_aside(worker)
            if room.avoided:
                last_resorts.append(worker)
    for worker in last_resorts:
        while model.waiting.ordinary_count and worker.is_ready:
            if not _grant_cohort(state, model, _room(model, worker, avoid=False), now):
                fleet.set_aside(worker)
                break


def _next_worker(state: State, model: Model, tried: set[int], now: float) -> Worker | None:
    """The best worker for the most urgent request, or the least busy one when that fits nowhere."""
    policy = POLICIES[state.policy.policy]
    anchor = policy.anchor(model.waiting, now)
    worker = model.fleet.choose(anchor, by_prefix=policy.by_prefix) if anchor is not None else None
    return worker if worker is not None and worker.lease not in tried else model.fleet.least_busy()


def _room(model: Model, worker: Worker, *, avoid: bool) -> Room:
    return Room(
        worker,
        -(-model.waiting.ordinary_count // max(1, model.fleet.ready_count)),
        avoid=avoid,
        prefill_tokens=worker.prefill_window - worker.prefill.tokens,
        uncached=partial(model.fleet.uncached, worker),
    )


def _bound(state: State, model: Model) -> int:
    """How often a request may be passed: each worker more grants so much more in the same time."""
    return state.policy.max_overtakes * max(1, model.fleet.serving)


def _grant_cohort(state: State, model: Model, room: Room, now: float) -> bool:
    """Grant what the policy chooses for a worker; whether there was anything."""
    policy = POLICIES[state.policy.policy]
    cohort = policy.cohort(model.waiting, room, now, _bound(state, model))
    if cohort:
        held_back = model.fleet.any_aside and any(map(model.waiting.leads, cohort))
        _grant(state, model, room.worker, cohort, now)
        if held_back:
            # Those behind it, which might not pass it, may fit workers for which nothing was fit.
            model.fleet.look_again(PROBES)
    return bool(cohort)


def _grant(state: State, model: Model, worker: Worker, cohort: list[Request], now: float) -> None:
    model.waiting.grant(cohort, _bound(state, model))
    state.waiting_count -= len(cohort)
    state.drain_rate.add(len(cohort), now)
    granted = [_granted(request, now) for request in cohort]
    arrays = _arrays(cohort)
    lengths = [entry.prompt_count for entry in granted]
    tokens = cached_tokens = 0
    number = worker.prefill.next_grant()
    for request in cohort:
        uncached = model.fleet.uncached(worker, request)
        tokens += request.tokens
        cached_tokens += request.tokens - uncached
        worker.hold(request, number, uncached, now)
        if request.names:
            model.fleet.prefixes.grant(worker.lease, request.names)
        request.drop_arrays()
    model.fleet.update(worker)
    message = Grant(worker.lease, tuple(granted))
    state.emit(ToWorker(worker.peer, message, arrays))
    state.record(
        "granted",
        request_ids=", ".join([entry.request_id for entry in granted]),
        model=model.card.name,
        worker=worker.worker_id,
        spread=max(lengths) / min(lengths),
        queue_seconds=tuple([entry.queue_seconds for entry in granted]),
        tokens=tokens,
        cached_tokens=cached_tokens,
    )


def _arrays(cohort: list[Request]) -> tuple[Array, Array, Array]:
    """Prompts, generated tokens and prefixes of a cohort, each one after another."""
    if len(cohort) == 1:
        (request,) = cohort
        return request.prompt, request.generated, request.prefixes
    prompts, generated, prefixes = array("I"), array("I"), array("Q")
    for request in cohort:
        prompts.frombytes(request.prompt.cast("B"))
        generated.frombytes(request.generated.cast("B"))
        prefixes.frombytes(request.prefixes.cast("B"))
    return memoryview(prompts), memoryview(generated), memoryview(prefixes)


def _granted(request: Request, now: float) -> GrantedRequest:
    submit = request.submit
    return GrantedRequest(
        gateway=request.key.gateway,
        request_id=submit.request_id,
        handle=submit.handle,
        attempt=submit.attempt,
        choices=submit.choices,
        prompt_count=len(request.prompt),
        generated_counts=submit.generated_counts,
        sampling=submit.sampling,
        queue_seconds=max(0.0, now - request.submitted),
        cache_salt=submit.cache_salt,
        prefix_count=len(request.prefixes),
        traceparent=submit.traceparent,
    )
