"""Requests coming in and being called off: validation, the queue's bound, repeats and cancels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from sfllm.errors import ErrorCode, quote
from sfllm.messages import (
    ALL_CHOICES,
    Admitted,
    Cancel,
    GatewayWelcome,
    Interrupted,
    Rejected,
    Submit,
    WorkerCancel,
)
from sfllm.wire import Array
from sfllm_scheduler.core.events import ToGateway, ToWorker
from sfllm_scheduler.core.requests import Key, Rank, Request
from sfllm_scheduler.core.state import Ended, HoldKey, Model, State

RETRY_QUEUE_FACTOR = 4
"""Retries pass the queue's bound, since their clients already read an answer; not without an end."""

MAX_CHOICES = 1024
MAX_NAME_CHARACTERS = 256
HANDLE_LIMIT = 2**64
COUNT_LIMIT = 2**32


class _RefusedError(Exception):
    def __init__(self, code: ErrorCode, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_seconds = retry_after_seconds


def submit(state: State, gateway: bytes, message: Submit, arrays: Sequence[Array], now: float) -> None:
    """Take a request into the queue, or say why not. The same attempt again is acknowledged again."""
    if gateway not in state.gateways:
        answer_unknown_gateway(state, gateway)
        return
    key = Key(gateway, message.handle)
    live = state.find(key)
    if live is not None and message.attempt <= live.submit.attempt:
        if message.attempt == live.submit.attempt:
            state.to_gateway(gateway, Admitted(message.handle, message.attempt))
        return
    ended = state.recent.get(key)
    if live is None and ended is not None and message.attempt <= ended.attempt:
        _answer_ended(state, key, message, ended)
        return
    if live is not None:
        state.end(live, now)
        ended = state.recent[key]
    rank = ended.rank if ended is not None else _next_rank(state, now)
    try:
        _admit(state, key, message, arrays, rank, now)
    except _RefusedError as refused:
        state.remember(key, Ended(message.attempt, rank, now + 2 * state.policy.lease_seconds))
        _reject(state, key, message, refused.code, refused.message, refused.retry_after_seconds)


def cancel(state: State, gateway: bytes, message: Cancel, now: float) -> None:
    """Forget a request, or one choice of it, wherever it is."""
    request = state.find(Key(gateway, message.handle))
    if request is None or request.submit.attempt > message.attempt:
        return
    if message.choice == ALL_CHOICES or _open_choices(state, request) == {message.choice}:
        state.end(request, now)
        state.record("cancelled", request_id=request.submit.request_id, reason=message.reason[:200])
    elif message.choice in _open_choices(state, request):
        _cancel_choice(state, request, message.choice)


def reject(
    state: State,
    request: Request,
    code: ErrorCode,
    message: str,
    now: float,
    retry_after_seconds: float | None = None,
) -> None:
    """End a live request with an error, wherever it is."""
    state.end(request, now)
    _reject(state, request.key, request.submit, code, message, retry_after_seconds)


def interrupt(state: State, request: Request, cause: str, worker: str, now: float) -> None:
    """End an attempt that may be submitted again."""
    state.end(request, now)
    submit = request.submit
    state.to_gateway(request.key.gateway, Interrupted(submit.handle, submit.attempt, cause, worker))
    state.record("interrupted", request_id=submit.request_id, cause=cause, worker=worker)


def reject_expired(state: State, now: float) -> None:
    """End what has passed its deadline, waiting or running."""
    for key in state.deadlines.due(now):
        request = state.find(key)
        if request is not None:
            where = "in the queue" if request.worker is None else "while it ran"
            reject(state, request, ErrorCode.DEADLINE_EXCEEDED, f"the deadline passed {where}", now)


def reject_workerless(state: State, now: float) -> None:
    """End what has waited long enough for a worker that could run it."""
    patience = state.policy.worker_wait_seconds
    for model in state.models.values():
        if model.workerless_since is not None and now >= model.workerless_since + patience:
            text = f"no worker serves {model.card.name} at the moment"
            for request in _submitted_before(model, now - patience):
                reject(state, request, ErrorCode.SERVICE_UNAVAILABLE, text, now, patience)
        if model.recheck_at is not None and now >= model.recheck_at:
            model.recheck_at = None
            _reject_unservable(state, model, now)


def answer_unknown_gateway(state: State, gateway: bytes) -> None:
    """A welcome to who is not known tells it that this scheduler holds nothing of it."""
    policy = state.policy
    welcome = GatewayWelcome(state.epoch, policy.beat_seconds, policy.lease_seconds)
    state.emit(ToGateway(gateway, welcome))


def _admit(state: State, key: Key, message: Submit, arrays: Sequence[Array], rank: Rank, now: float) -> None:
    _check_shape(message, arrays)
    model = state.model_named(message.model)
    if model is None:
        raise _RefusedError(ErrorCode.MODEL_NOT_FOUND, f"the model {quote(message.model)} does not exist")
    request = Request(key, message, arrays, model.card.name, rank, now)
    _check_fits(model, request)
    bound = state.policy.max_queue_requests
    if state.waiting_count >= (bound if message.attempt == 0 else bound * RETRY_QUEUE_FACTOR):
        raise _RefusedError(
            ErrorCode.QUEUE_FULL,
            f"{state.waiting_count} requests wait already; try again later",
            state.drain_rate.retry_after(state.waiting_count, now),
        )
    state.enqueue(request)
    state.deadlines.add(key, message.attempt, now + message.milliseconds_left / 1000)
    state.to_gateway(key.gateway, Admitted(message.handle, message.attempt))
    state.record("admitted", request_id=message.request_id, attempt=message.attempt, tokens=request.tokens)


def _check_shape(message: Submit, arrays: Sequence[Array]) -> None:
    """Refuse what cannot be right, so that no later arithmetic has to doubt it."""
    prompt, generated = arrays
    choices, counts = message.choices, message.generated_counts
    sound = (
        len(prompt) > 0
        and 0 < len(choices) <= MAX_CHOICES
        and len(set(choices)) == len(choices) == len(counts)
        and all(0 <= choice < COUNT_LIMIT for choice in choices)
        and all(count >= 0 for count in counts)
        and sum(counts) == len(generated)
        and 0 <= message.handle < HANDLE_LIMIT
        and 0 <= message.attempt < COUNT_LIMIT
        and message.sampling.max_tokens >= 1
        and max(len(message.request_id), len(message.last_worker)) <= MAX_NAME_CHARACTERS
    )
    if not sound:
        raise _RefusedError(ErrorCode.INVALID_REQUEST, "the request contradicts itself (counts and arrays)")


def _check_fits(model: Model, request: Request) -> None:
    """Refuse what is too large for the model or for every worker that it has."""
    if request.longest >= model.card.max_model_len:
        raise _RefusedError(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f"{request.longest} tokens leave no room for output in the context of "
            f"{model.card.max_model_len} tokens of {model.card.name}",
        )
    workers = model.workers.values()
    if not workers or any(worker.can_ever_run(request) for worker in workers):
        return
    room = max(worker.capacity.kv_tokens for worker in workers)
    raise _RefusedError(
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        f"the request needs a cache of {request.least_kv_tokens} tokens, but workers have {room}",
    )


def _submitted_before(model: Model, at: float) -> list[Request]:
    return list(takewhile(lambda request: request.submitted <= at, model.waiting.by_submission()))


def _reject_unservable(state: State, model: Model, now: float) -> None:
    """End what none of the model's workers, which have changed since it came, could hold."""
    for request in list(model.waiting.by_submission()):
        try:
            _check_fits(model, request)
        except _RefusedError as refused:
            reject(state, request, refused.code, refused.message, now)


def _reject(
    state: State, key: Key, submit: Submit, code: ErrorCode, message: str, retry_after_seconds: float | None
) -> None:
    rejected = Rejected(submit.handle, submit.attempt, code, message, retry_after_seconds)
    state.to_gateway(key.gateway, rejected)
    state.record("rejected", request_id=submit.request_id[:200], reason=code, message=message)


def _answer_ended(state: State, key: Key, message: Submit, ended: Ended) -> None:
    """A repeat of what has ended: if the gateway missed the end, this lets it go on."""
    if message.attempt == ended.attempt:
        state.to_gateway(key.gateway, Interrupted(message.handle, message.attempt, "already_ended", ""))


def _next_rank(state: State, now: float) -> Rank:
    state.sequence += 1
    return Rank(now, state.sequence)


def _open_choices(state: State, request: Request) -> set[int]:
    if request.worker is None:
        return set(request.submit.choices)
    return state.workers[request.worker].holds[HoldKey(request.key, request.submit.attempt)].open_choices


def _cancel_choice(state: State, request: Request, choice: int) -> None:
    """End one of several open choices."""
    if request.worker is None:
        request.without_choice(choice)
        state.models[request.model].may_grant = True
        return
    worker, attempt = state.workers[request.worker], request.submit.attempt
    worker.holds[HoldKey(request.key, attempt)].open_choices.discard(choice)
    state.emit(ToWorker(worker.peer, WorkerCancel(worker.lease, *request.key, attempt, choice)))
