"""From workers to gateways: tokens, ends of choices and faults, and the credits that return."""

from __future__ import annotations

from collections.abc import Sequence

from sfllm.errors import ErrorCode
from sfllm.messages import (
    Rejected,
    Tokens,
    WorkerBeat,
    WorkerFault,
    WorkerFinished,
    WorkerProgress,
    WorkerPromptLogprobs,
    WorkerReturned,
    WorkerTokens,
)
from sfllm.token_batch import check_arrays
from sfllm.wire import Array, WireError
from sfllm_scheduler.core import suspects
from sfllm_scheduler.core.endings import interrupt
from sfllm_scheduler.core.requests import Key
from sfllm_scheduler.core.served import note_finished
from sfllm_scheduler.core.state import State
from sfllm_scheduler.core.workers import HoldKey, Worker

_TOKENS = Tokens()


def tokens(state: State, worker: Worker, message: WorkerTokens, arrays: Sequence[Array]) -> None:
    """Pass one step's tokens on as they are; what is for a gateway that left is dropped.

    The arrays are read only while the worker has suspects.
    """
    try:
        check_arrays(arrays)
    except WireError as error:
        state.record("malformed", link="worker", peer=worker.worker_id, error=str(error))
        return
    state.to_gateway(message.gateway, _TOKENS, tuple(arrays))
    if worker.probation and suspects.note_progress(worker, message.gateway, arrays):
        state.worker_changed(worker)


def prompt_logprobs(state: State, message: WorkerPromptLogprobs, arrays: Sequence[Array]) -> None:
    """Pass them on as they are; the gateway knows whether it still wants them."""
    state.to_gateway(message.gateway, message.logprobs, tuple(arrays))


def finished(
    state: State, worker: Worker, message: WorkerFinished, arrays: Sequence[Array], now: float
) -> None:
    """A choice ended; with the last one of a request, its credits return."""
    end = message.finished
    key = HoldKey(Key(message.gateway, end.handle), end.attempt)
    hold = worker.holds.get(key)
    if hold is None or end.choice not in hold.request.open:
        state.record("dropped", kind="finished", worker=worker.worker_id)
        return
    state.to_gateway(message.gateway, end, tuple(arrays))
    note_finished(state, hold.request, end, now)
    state.close_choice(hold.request, end.choice)
    if hold.request.open:
        return
    request = state.release(worker, key)
    state.end(request, now)
    state.record_request("finished", request.submit, reason=end.reason)


def returned(state: State, worker: Worker, message: WorkerReturned, now: float) -> None:
    """A worker gives back what it has not begun: it leaves, or it was asked to (`recall.py`)."""
    key = HoldKey(Key(message.gateway, message.handle), message.attempt)
    if key not in worker.holds:
        state.record("dropped", kind="returned", worker=worker.worker_id)
        return
    cause = "drain" if worker.draining else "moved"
    interrupt(state, state.release(worker, key), cause, worker.worker_id, now)


def progress(state: State, worker: Worker, message: WorkerProgress) -> None:
    """A worker says how much it has left to prefill."""
    try:
        worker.prefill.progress(message.grants, message.pending_tokens)
    except ValueError as error:
        state.record("malformed", link="worker", peer=worker.worker_id, error=str(error))
        return
    state.worker_changed(worker)


def beat(state: State, worker: Worker, message: WorkerBeat, arrays: Sequence[Array]) -> None:
    """A worker beats: how many sequences it takes now, how fast it is, what its cache has."""
    worker.follow(message.slots, message.step_curve)
    if message.digest == worker.digest and worker.holds:
        worker.prefill.arrived(next(reversed(worker.holds.values())).grant)
    model = state.models.get(worker.card.name)
    if model is not None and worker.peer in model.workers:
        model.fleet.prefixes.beat(worker.lease, arrays[0].tolist())
        state.worker_changed(worker)


def fault(state: State, worker: Worker, message: WorkerFault, now: float) -> None:
    """The worker could not serve a request: its gateway hears why, and the credits return."""
    key = HoldKey(Key(message.gateway, message.handle), message.attempt)
    if key not in worker.holds:
        state.record("dropped", kind="fault", worker=worker.worker_id)
        return
    request = state.release(worker, key)
    state.end(request, now)
    code = message.code if message.code in set(ErrorCode) else ErrorCode.ENGINE_FAILURE
    state.to_gateway(message.gateway, Rejected(message.handle, message.attempt, code, message.message))
    state.record_request("rejected", request.submit, reason=code, message=message.message)
