"""Comparing what a peer holds with what it should hold, and repairing the difference.

The unit is an open choice (`sfllm.holdings`). Every beat of a gateway or worker carries the digest
of its open choices. When that differs from the digest kept here, the peer is asked for the list; asks
are numbered, one a beat. What differs is no error in itself: messages are always under way.
So an answer is judged only by what both sides knew before the ask. The links keep the order, hence:

- what was granted to a worker before the ask, and is not in its list, never arrived, or its end got lost;
- what a worker lists and should not hold was cancelled, and the cancel got lost or is under way;
- what a gateway lists and is not open here was lost on either way, unless it ended after the ask:
  then the end is under way;
- what is open here and a gateway does not list is not wanted any more.

Whatever gets lost, on whatever link, is one of these cases; the next beats find and repair it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sfllm.messages import GatewayHeld, Interrupted, ListHeld, Resend, WorkerHeld, WorkerResend
from sfllm.wire import Array
from sfllm_scheduler.core.endings import cancel_at_worker, cancel_choices, interrupt
from sfllm_scheduler.core.events import ToWorker
from sfllm_scheduler.core.refusal import COUNT_LIMIT
from sfllm_scheduler.core.requests import Key
from sfllm_scheduler.core.state import Gateway, State
from sfllm_scheduler.core.workers import HoldKey, Worker

MAX_LISTED = 2**18
"""Choices in one list. More than any honest peer holds, few enough to be judged at once."""

LOST = "lost"


def compare_gateway(state: State, gateway: Gateway, digest: int) -> None:
    """A gateway has beaten: ask for its list when it does not hold what it should."""
    if digest != gateway.digest:
        gateway.asked += 1
        state.to_gateway(gateway.peer, ListHeld(gateway.asked))


def compare_worker(state: State, worker: Worker, digest: int) -> None:
    """A worker has beaten: ask for its list when it does not hold what it should."""
    if digest != worker.digest:
        worker.asked += 1
        state.emit(ToWorker(worker.peer, ListHeld(worker.asked)))


def gateway_held(
    state: State, gateway: Gateway, message: GatewayHeld, arrays: Sequence[Array], now: float
) -> None:
    """Judge the list of a gateway."""
    if not _is_expected(state, gateway, message.number, arrays, "gateway"):
        return
    listed = dict.fromkeys(zip(*arrays, strict=True))
    lost = _interrupt_missing(state, gateway, message.number, listed, now)
    unwanted = 0
    for request in list(gateway.requests.values()):
        handle, attempt = request.key.handle, request.submit.attempt
        missing = [choice for choice in request.open if (handle, attempt, choice) not in listed]
        if missing and request.asked < message.number:
            cancel_choices(state, request, missing, "the gateway does not have it any more", now)
            unwanted += len(missing)
    state.record("reconciled", link="gateway", lost=lost, unwanted=unwanted)


def worker_held(
    state: State, worker: Worker, message: WorkerHeld, arrays: Sequence[Array], now: float
) -> None:
    """Judge the list of a worker."""
    gateways, handles, attempts, choices = arrays
    if not _is_expected(state, worker, message.number, arrays, "worker"):
        return
    if any(index >= len(message.gateways) for index in gateways):
        _say_malformed(state, "worker", worker.peer, "a list names a gateway that it does not have")
        return
    listed = {
        (HoldKey(Key(message.gateways[index], handle), attempt), choice)
        for index, handle, attempt, choice in zip(gateways, handles, attempts, choices, strict=True)
    }
    unknown = [
        (key, choice)
        for key, choice in listed
        if key not in worker.holds or choice not in worker.holds[key].request.open
    ]
    for key, choice in sorted(unknown):
        cancel_at_worker(state, worker, *key, choice)
    lost = 0
    for key, hold in list(worker.holds.items()):
        missing = sum((key, choice) not in listed for choice in hold.request.open)
        if missing and hold.asked < message.number:
            interrupt(state, hold.request, LOST, worker.worker_id, now)
            lost += missing
    state.record("reconciled", link="worker", lost=lost, unwanted=len(unknown))


def resend(state: State, gateway: Gateway, message: Resend, now: float) -> None:
    """Pass on that tokens are missing; when nobody can send them again, the attempt is lost."""
    if not 0 <= message.start < COUNT_LIMIT:
        _say_malformed(state, "gateway", gateway.peer, "no token can have that index")
        return
    request = gateway.requests.get(message.handle)
    if request is None or request.submit.attempt != message.attempt:
        _say_lost(state, gateway, message.handle, message.attempt)
    elif request.worker is None or message.choice not in request.open:
        interrupt(state, request, LOST, "", now)
    else:
        worker = state.workers[request.worker]
        missing = WorkerResend(worker.lease, *request.key, message.attempt, message.choice, message.start)
        state.emit(ToWorker(worker.peer, missing))


def _interrupt_missing(
    state: State, gateway: Gateway, number: int, listed: dict[tuple[int, ...], None], now: float
) -> int:
    """Interrupt what the gateway lists and is not open here; how many choices that are."""
    lost: dict[tuple[int, int], int] = {}
    for handle, attempt, choice in listed:
        request = gateway.requests.get(handle)
        if request is not None and request.submit.attempt == attempt:
            if choice in request.open or request.closed.get(choice, 0) >= number:
                continue
        else:
            ended = state.recent.get(Key(gateway.peer, handle))
            if ended is not None and attempt <= ended.attempt and ended.asked >= number:
                continue  # its end is under way
        lost[handle, attempt] = lost.get((handle, attempt), 0) + 1
    for handle, attempt in lost:
        request = gateway.requests.get(handle)
        if request is not None and request.submit.attempt == attempt:
            interrupt(state, request, LOST, "", now)
        else:
            _say_lost(state, gateway, handle, attempt)
    return sum(lost.values())


def _say_lost(state: State, gateway: Gateway, handle: int, attempt: int) -> None:
    state.to_gateway(gateway.peer, Interrupted(handle, attempt, LOST, ""))


def _is_expected(
    state: State, peer: Gateway | Worker, number: int, arrays: Sequence[Array], link: str
) -> bool:
    """Whether this is a sound answer to a question that was asked and not answered yet."""
    lengths = {len(column) for column in arrays}
    if len(lengths) != 1 or max(lengths) > MAX_LISTED:
        _say_malformed(state, link, peer.peer, "the columns of a list disagree, or it is too long")
        return False
    if not peer.answered < number <= peer.asked:
        state.record("dropped", kind="list of " + link, peer=peer.peer.decode("ascii", "replace"))
        return False
    peer.answered = number
    return True


def _say_malformed(state: State, link: str, peer: bytes, error: str) -> None:
    state.record("malformed", link=link, peer=peer.decode("ascii", "replace"), error=error)
