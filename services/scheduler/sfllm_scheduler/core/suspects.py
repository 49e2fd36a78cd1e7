"""Finding the request that makes workers crash, without making the others pay for it.

When a worker crashes, nobody knows which of its requests was the cause, or whether any was: the host
may have failed, or somebody killed the process. What it ran are *suspects*, and they are tried like this:

1. The gateways submit them again, each with the number of suspects of its crash, its group size `g`.
2. At most half of a group (`group_cap`) run on a worker together, and no others join them there. What
   the worker held before stays.
3. A suspect is *cleared* when it has got `PROBATION_TOKENS` further, ended, or run for
   `PROBATION_SECONDS`: what the crash interrupted has then been computed. Clearing all of them opens
   the worker to everybody.
4. When that worker crashes too, only those of its suspects that are not cleared stay suspects: at
   most half as many as before. All else that it held is innocent (g = 0).
5. A group of two, or of one, is tried one by one, each alone on a worker that holds nothing else. If
   no worker is empty, one is *reserved*: it gets nothing new, and what it still holds after
   `RESERVE_SECONDS` moves elsewhere. So a suspect does not wait for the end of the longest stream.
6. Who was alone on its worker at two crashes, with no progress between them, is not tried again
   (`CRASHES_ALONE_LIMIT`). The gateway counts those crashes, since a scheduler may be restarted.

A group of n is thus searched in about log2(n) crashes and two more. Innocent suspects lose little: most
are cleared with their first half and go on while the search does. Other requests wait, for seconds, for
workers that are on trial or reserved; at most a quarter of a model's workers are reserved at a time.

`g` is 1 only for a request that really was alone: if others had been on the worker that were not
suspected, then 2 is said, which tries it alone without counting against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from sfllm.token_batch import rows
from sfllm.wire import Array
from sfllm_scheduler.core.cohorts import Room
from sfllm_scheduler.core.fleet import Fleet
from sfllm_scheduler.core.requests import Key, Request
from sfllm_scheduler.core.workers import HoldKey, Worker

PROBATION_SECONDS = 10.0
RESERVE_SECONDS = 5.0
RESERVED_SHARE = 4
LOOKED_AT = 64
"""Workers without suspects, the least busy first, that are asked whether they could take one."""

CRASHES_ALONE_LIMIT = 2


def group_cap(suspects: int) -> int:
    """How many of a group of so many suspects may be on a worker together."""
    return max(1, (suspects + 1) // 2)


def blame(worker: Worker) -> dict[HoldKey, int]:
    """What a worker that has just crashed may have died of, each with the size of that group."""
    suspects = worker.probation or worker.holds
    size = len(suspects)
    if size == 1 and len(worker.holds) > 1:
        size = 2
    return dict.fromkeys(suspects, size)


def note_progress(worker: Worker, gateway: bytes, arrays: Sequence[Array]) -> bool:
    """Clear the suspects that have got far enough by these rows of tokens; whether there was one."""
    before = len(worker.probation)
    for row in rows(arrays):
        key = HoldKey(Key(gateway, row.handle), row.attempt)
        trial = worker.probation.get(key)
        end = row.start + len(row.ids)
        if trial is not None and end >= trial.goals.get(row.choice, end + 1):
            del worker.probation[key]
    return len(worker.probation) < before


def clear_by_time(worker: Worker, now: float) -> bool:
    """Clear the suspects that have run here for long enough; whether there was one."""
    before = len(worker.probation)
    worker.probation = {
        key: trial for key, trial in worker.probation.items() if now - trial.since < PROBATION_SECONDS
    }
    return len(worker.probation) < before


def place(fleet: Fleet, suspect: Request) -> Worker | None:
    """Where a suspect can go now: to the worker reserved for it, to its group, or to one without suspects."""
    special = [worker for worker in fleet.special.values() if _can_take(worker, suspect)]
    if special:
        return min(
            special, key=lambda worker: (worker.reserved is not suspect, not worker.probation, worker.load)
        )
    others = islice(fleet.by_load(), LOOKED_AT)
    return next((worker for worker in others if _can_take(worker, suspect)), None)


def group(worker: Worker, first: Request, waiting: Iterable[Request]) -> list[Request]:
    """The suspects that go to a worker together: `first`, and others of its group while there is room."""
    most = group_cap(first.suspects) - len(worker.probation)
    room = Room(worker, worker.free_slots, avoid=False)
    room.take(first)
    members = [first]
    for other in waiting:
        if len(members) >= most:
            break
        if other is not first and other.suspects == first.suspects and room.fits(other):
            room.take(other)
            members.append(other)
    return members


def reserve(fleet: Fleet, suspect: Request, now: float) -> None:
    """Keep a worker free of new requests until this suspect fits, if not too many are kept already."""
    kept = [worker.reserved for worker in fleet.special.values() if worker.reserved is not None]
    if suspect in kept or len(kept) >= max(1, fleet.serving // RESERVED_SHARE):
        return
    ready = islice(fleet.by_load(), LOOKED_AT)
    least = next((worker for worker in ready if worker.can_ever_run(suspect)), None)
    if least is None:  # all are busy; then the whole fleet is looked at, but only until one is reserved
        possible = (
            worker
            for worker in fleet.workers.values()
            if worker.reserved is None
            and not worker.draining
            and not worker.probation
            and worker.can_ever_run(suspect)
        )
        least = min(possible, key=lambda worker: worker.load, default=None)
    if least is not None:
        least.reserved, least.reserved_since = suspect, now
        fleet.update(least)


def must_be_emptied(worker: Worker, now: float) -> bool:
    """Whether it is time to move what a worker holds, since a suspect waits for being alone there."""
    suspect = worker.reserved
    return (
        suspect is not None
        and group_cap(suspect.suspects) == 1
        and bool(worker.holds)
        and now - worker.reserved_since >= RESERVE_SECONDS
    )


def _can_take(worker: Worker, suspect: Request) -> bool:
    if worker.draining or (worker.reserved is not None and worker.reserved is not suspect):
        return False
    cap = group_cap(suspect.suspects)
    if worker.probation:
        size = next(iter(worker.probation.values())).group_size
        joins = cap > 1 and size == suspect.suspects and len(worker.probation) < cap
        return joins and _fits(worker, suspect)
    return (cap > 1 or not worker.holds) and _fits(worker, suspect)


def _fits(worker: Worker, suspect: Request) -> bool:
    return Room(worker, worker.free_slots, avoid=False).fits(suspect)
