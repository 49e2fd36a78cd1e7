"""Asking back requests that wait at a busy worker while another one has nothing to do.

Grants are kept short of two steps of prefill, so little waits at a worker; but a worker may be slow, or hold
what came in a burst when all others were busy. What another worker could begin at once is then recalled,
the newest grants first, since they have certainly not begun. The worker answers with `WorkerReturned` if that
is so, and the gateway submits again, away from that worker. A lost `Recall` changes nothing, and a lost
answer is found by the digests of the next beat.

Each attempt is asked back at most once, and only first attempts are: so nothing wanders about.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from sfllm.messages import Recall
from sfllm_scheduler.core.events import ToWorker
from sfllm_scheduler.core.state import Model, State
from sfllm_scheduler.core.workers import Hold, HoldKey, Worker

RECALL_SECONDS = 0.25

GAIN_SECONDS = 0.5
"""What a move must save at least: it costs a way to the gateway and back, and the place in a cache."""

MAX_RECALLS = 64
"""Of one model at a time, so that a burst does not all move at once."""


def recall(state: State, now: float) -> None:
    """Recall what idle workers could begin at once. Looks at every worker, so only now and then."""
    if now < state.next_recall:
        return
    state.next_recall = now + RECALL_SECONDS
    for model in state.models.values():
        if not model.waiting:
            _recall_of(state, model)


def _recall_of(state: State, model: Model) -> None:
    busy = [worker for worker in model.workers.values() if _backlog_seconds(worker) > GAIN_SECONDS]
    if not busy:
        return
    idle = [worker for worker in model.workers.values() if worker.is_ready and not worker.prefill.tokens]
    idle.sort(key=lambda worker: (worker.load, worker.lease))
    busy.sort(key=lambda worker: (-_backlog_seconds(worker), worker.lease))
    takers = iter(idle[:MAX_RECALLS])
    taker = next(takers, None)
    for worker in busy[:MAX_RECALLS]:
        for key, hold in _not_begun(worker):
            if taker is None:
                return
            if not _fits(worker, taker, hold) or _gain(worker, taker, hold) < GAIN_SECONDS:
                continue
            hold.recalled = True
            state.emit(ToWorker(worker.peer, Recall(worker.lease, *key.key, key.attempt)))
            state.record_request("recalled", hold.request.submit, worker=worker.worker_id)
            taker = next(takers, None)


def _not_begun(worker: Worker) -> Iterator[tuple[HoldKey, Hold]]:
    """Requests behind at least one whole step of others, the newest first; some may have begun after all."""
    behind = worker.prefill.tokens
    for key, hold in islice(reversed(worker.holds.items()), MAX_RECALLS):
        behind -= hold.prefill_tokens
        if behind < worker.capacity.step_tokens:
            return
        if not (hold.recalled or hold.request.is_retry or hold.request.suspects):
            yield key, hold


def _fits(worker: Worker, taker: Worker, hold: Hold) -> bool:
    """Whether another worker has the room that it takes here; its prompt is not known any more."""
    return (
        hold.slots <= taker.free_slots
        and hold.kv_tokens <= taker.free_kv_tokens
        and worker.card.max_model_len <= taker.card.max_model_len
    )


def _backlog_seconds(worker: Worker) -> float:
    return worker.prefill.tokens * worker.speed.prefill_token


def _gain(worker: Worker, taker: Worker, hold: Hold) -> float:
    """Seconds that its first token would come earlier at the other worker."""
    here = _backlog_seconds(worker)
    return here - hold.request.uncached * taker.speed.prefill_token
