"""Granting: which worker gets the next cohort, and the message that hands it over."""

from __future__ import annotations

from array import array

from sfllm.messages import Grant, GrantedRequest
from sfllm_scheduler.core.cohorts import POLICIES, Room
from sfllm_scheduler.core.events import ToWorker
from sfllm_scheduler.core.requests import Request
from sfllm_scheduler.core.state import Model, State
from sfllm_scheduler.core.workers import Worker


def grant_all(state: State, now: float) -> None:
    """Grant what can be granted. Afterwards no worker idles while a request that it could run waits."""
    for model in state.models.values():
        if not model.may_grant:
            continue
        model.may_grant = False
        # A retried request first looks for a worker other than its last one.
        for avoid in (True, False):
            _grant_model(state, model, now, avoid=avoid)


def _grant_model(state: State, model: Model, now: float, *, avoid: bool) -> None:
    policy = POLICIES[state.policy.policy]
    candidates = [worker for worker in model.serving if _has_room(worker)]
    while candidates and len(model.waiting):
        worker = min(candidates, key=_load)
        share = -(-len(model.waiting) // len(candidates))
        cohort = policy(model.waiting, Room(worker, share, avoid=avoid), state.policy.max_overtakes)
        if cohort:
            _grant(state, model, worker, cohort, now)
        if not cohort or not _has_room(worker):
            candidates.remove(worker)


def _has_room(worker: Worker) -> bool:
    return worker.free_slots > 0 and worker.free_kv_tokens > 0


def _load(worker: Worker) -> tuple[float, int]:
    """How busy a worker is: the share of its sequences in use, then the least free cache."""
    return worker.used_slots / worker.capacity.slots, -worker.free_kv_tokens


def _grant(state: State, model: Model, worker: Worker, cohort: list[Request], now: float) -> None:
    model.waiting.grant(cohort, state.policy.max_overtakes)
    state.waiting_count -= len(cohort)
    state.drain_rate.add(len(cohort), now)
    prompts, generated = array("I"), array("I")
    granted = []
    lengths = []
    for request in cohort:
        granted.append(_granted(request, now))
        lengths.append(len(request.prompt))
        prompts.frombytes(request.prompt.cast("B"))
        generated.frombytes(request.generated.cast("B"))
        worker.hold(request)
        request.drop_arrays()
    message = Grant(worker.lease, tuple(granted))
    state.emit(ToWorker(worker.peer, message, (memoryview(prompts), memoryview(generated))))
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
    )
