"""What time brings to requests: deadlines that pass, and workers that do not come."""

from __future__ import annotations

from itertools import takewhile

from sfllm.errors import ErrorCode
from sfllm_scheduler.core.endings import reject
from sfllm_scheduler.core.refusal import RefusedError, check_fits
from sfllm_scheduler.core.requests import Request
from sfllm_scheduler.core.state import Model, State


def reject_expired(state: State, now: float) -> None:
    """End what has passed its deadline, waiting or running."""
    for key in state.deadlines.due(now):
        request = state.find(key)
        if request is not None:
            where = "in the queue" if request.worker is None else "while it ran"
            reject(state, request, ErrorCode.DEADLINE_EXCEEDED, f"the deadline passed {where}", now)


def reject_workerless(state: State, now: float) -> None:
    """End what has waited long enough for a worker that could run it.

    Retries go on waiting until their deadline: their clients may have read half an answer already.
    """
    patience = state.policy.worker_wait_seconds
    for model in state.models.values():
        if model.workerless_since is not None and now >= model.workerless_since + patience:
            text = f"no worker serves {model.card.name} at the moment"
            for request in _submitted_before(model, now - patience):
                if not request.is_retry:
                    reject(state, request, ErrorCode.SERVICE_UNAVAILABLE, text, now, patience)
        if model.recheck_at is not None and now >= model.recheck_at:
            model.recheck_at = None
            _reject_unservable(state, model, now)


def _submitted_before(model: Model, at: float) -> list[Request]:
    return list(takewhile(lambda request: request.submitted <= at, model.waiting.by_submission()))


def _reject_unservable(state: State, model: Model, now: float) -> None:
    """End what none of the model's workers, which have changed since it came, could hold."""
    for request in list(model.waiting.by_submission()):
        try:
            check_fits(model, request)
        except RefusedError as refused:
            reject(state, request, refused.code, refused.message, now)
