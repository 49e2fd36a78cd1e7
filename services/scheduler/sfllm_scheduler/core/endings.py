"""How a live request ends before its time: cancelled, rejected with an error, or interrupted."""

from __future__ import annotations

from collections.abc import Iterable

from sfllm.errors import ErrorCode
from sfllm.messages import ALL_CHOICES, Cancel, Interrupted, Rejected, Submit, WorkerCancel
from sfllm_scheduler.core.events import ToWorker
from sfllm_scheduler.core.requests import Key, Request
from sfllm_scheduler.core.state import State
from sfllm_scheduler.core.workers import Worker


def cancel(state: State, gateway: bytes, message: Cancel, now: float) -> None:
    """The gateway wants no more of a request, or of one choice of it, wherever it is."""
    request = state.find(Key(gateway, message.handle))
    if request is not None and request.submit.attempt <= message.attempt:
        choices = request.open if message.choice == ALL_CHOICES else (message.choice,)
        cancel_choices(state, request, choices, message.reason, now)


def cancel_choices(state: State, request: Request, choices: Iterable[int], reason: str, now: float) -> None:
    """End those of the choices that are open, and the request when none other is."""
    ending = [choice for choice in choices if choice in request.open]
    if len(ending) == len(request.open):
        waited = _waited(request, now)
        state.end(request, now)
        state.record_request("cancelled", request.submit, reason=reason[:200], **waited)
        return
    for choice in ending:
        state.close_choice(request, choice)
        if request.worker is None:
            request.without_choice(choice)
            state.queue_changed(state.models[request.model])
        else:
            cancel_at_worker(
                state, state.workers[request.worker], request.key, request.submit.attempt, choice
            )


def cancel_at_worker(state: State, worker: Worker, key: Key, attempt: int, choice: int) -> None:
    """Tell a worker to let go of one choice."""
    state.emit(ToWorker(worker.peer, WorkerCancel(worker.lease, *key, attempt, choice)))


def reject(
    state: State,
    request: Request,
    code: ErrorCode,
    message: str,
    now: float,
    retry_after_seconds: float | None = None,
) -> None:
    """End a live request with an error, wherever it is."""
    waited = _waited(request, now)
    state.end(request, now)
    say_rejected(state, request.key, request.submit, code, message, retry_after_seconds, **waited)


def say_rejected(
    state: State,
    key: Key,
    submit: Submit,
    code: ErrorCode,
    message: str,
    retry_after_seconds: float | None,
    **waited: float,
) -> None:
    """Tell a gateway that a request, which is in no table, has ended with an error."""
    rejected = Rejected(submit.handle, submit.attempt, code, message, retry_after_seconds)
    state.to_gateway(key.gateway, rejected)
    state.record_request("rejected", submit, reason=code, message=message, **waited)


def _waited(request: Request, now: float) -> dict[str, float]:
    """For the record of its end: how long a request was in the queue that no worker has got."""
    return {"waited_seconds": now - request.submitted} if request.worker is None else {}


def interrupt(state: State, request: Request, cause: str, worker: str, now: float, suspects: int = 0) -> None:
    """End an attempt that may be submitted again. `suspects` is explained at `Interrupted`."""
    state.end(request, now)
    if request.model in state.models:
        state.models[request.model].waiting.refund(request)
    submit = request.submit
    message = Interrupted(submit.handle, submit.attempt, cause, worker, suspects)
    state.to_gateway(request.key.gateway, message)
    state.record_request("interrupted", submit, cause=cause, worker=worker, suspects=suspects)
