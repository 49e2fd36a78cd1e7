"""Granting: which worker gets the next cohort, and the message that hands it over."""

from __future__ import annotations

from array import array

from sfllm.messages import Grant, GrantedRequest
from sfllm_scheduler.core import suspects
from sfllm_scheduler.core.cohorts import LOOK_AHEAD, POLICIES, Room
from sfllm_scheduler.core.events import ToWorker
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
        _grant_suspects(state, model, now)
        # A retried request first looks for a worker other than its last one.
        for avoid in (True, False):
            _grant_model(state, model, now, avoid=avoid)
        model.backlog.note(waited - len(model.waiting), len(model.waiting), now)


def _grant_suspects(state: State, model: Model, now: float) -> None:
    """Suspects go first: they ran before, and few of them can go at a time."""
    _end_reservations(model)
    serving = model.serving
    left = 0
    for request in list(model.waiting.suspects):
        if request.worker is not None:
            continue  # it went with an earlier one
        worker = suspects.place(serving, request)
        if worker is not None:
            _grant(state, model, worker, suspects.group(worker, request, model.waiting.suspects), now)
            continue
        suspects.reserve(serving, request, now)
        left += 1
        if left > LOOK_AHEAD:
            break
    _end_reservations(model)


def _end_reservations(model: Model) -> None:
    """Open workers that were kept free for a suspect which does not wait any more."""
    for worker in model.workers.values():
        if worker.reserved is not None and (worker.draining or worker.reserved not in model.waiting):
            worker.reserved = None


def _grant_model(state: State, model: Model, now: float, *, avoid: bool) -> None:
    policy = POLICIES[state.policy.policy]
    candidates = [worker for worker in model.serving if worker.has_room and worker.takes_anybody]
    while candidates and model.waiting.ordinary_count:
        worker = min(candidates, key=lambda worker: worker.load)
        share = -(-model.waiting.ordinary_count // len(candidates))
        room = Room(worker, share, avoid=avoid)
        cohort = policy.cohort(model.waiting, room, now, state.policy.max_overtakes)
        if cohort:
            _grant(state, model, worker, cohort, now)
        if not cohort or not worker.has_room:
            candidates.remove(worker)


def _grant(state: State, model: Model, worker: Worker, cohort: list[Request], now: float) -> None:
    model.waiting.grant(cohort, state.policy.max_overtakes)
    state.waiting_count -= len(cohort)
    state.drain_rate.add(len(cohort), now)
    prompts, generated, prefixes = array("I"), array("I"), array("Q")
    granted = []
    lengths = []
    for request in cohort:
        granted.append(_granted(request, now))
        lengths.append(len(request.prompt))
        prompts.frombytes(request.prompt.cast("B"))
        generated.frombytes(request.generated.cast("B"))
        prefixes.frombytes(request.prefixes.cast("B"))
        worker.hold(request, now)
        request.drop_arrays()
    message = Grant(worker.lease, tuple(granted))
    arrays = (memoryview(prompts), memoryview(generated), memoryview(prefixes))
    state.emit(ToWorker(worker.peer, message, arrays))
    state.record(
        "granted",
        request_ids=", ".join(entry.request_id for entry in granted),
        model=model.card.name,
        worker=worker.worker_id,
        spread=max(lengths) / min(lengths),
        queue_seconds=tuple(entry.queue_seconds for entry in granted),
    )


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
    )
