"""What must hold of a fleet's lists and totals, checked by looking at every worker."""

from __future__ import annotations

from sfllm_scheduler.core.fleet import Fleet
from sfllm_scheduler.core.prefix_index import MAX_NAMES
from sfllm_scheduler.core.workers import InvariantError


def check_fleet(model: str, fleet: Fleet) -> None:
    """Raise `InvariantError` for the first contradiction."""
    workers = fleet.workers.values()
    serving = [worker for worker in workers if not worker.draining]
    _require(fleet.serving == len(serving), model, "the count of workers is wrong")
    _require(fleet.slots == sum(worker.capacity.slots for worker in serving), model, "slots do not add up")
    ready, aside = fleet.places()
    expected = sorted((worker.load, worker.lease) for worker in workers if worker.is_ready)
    set_aside = {lease for _, lease in aside}
    listed = [place for place in expected if place[1] not in set_aside]
    _require(ready == listed, model, "the list of ready workers is wrong")
    _require(set_aside <= {lease for _, lease in expected}, model, "a worker without room is set aside")
    longest = max((worker.context_limit for worker in workers), default=0)
    _require(fleet.context_limit == longest, model, "the longest context is wrong")
    special = {worker.lease for worker in workers if worker.probation or worker.reserved is not None}
    _require(set(fleet.special) == special, model, "workers with suspects are not known as such")
    names = {worker.lease: fleet.prefixes.names(worker.lease) for worker in workers}
    _require(all(len(known) <= MAX_NAMES for known in names.values()), model, "too many names are kept")
    holders: dict[int, list[int]] = {}
    for lease in sorted(names):
        for name in names[lease]:
            holders.setdefault(name, []).append(lease)
    _require(fleet.prefixes.held_by_name() == holders, model, "names of workers and workers of names differ")


def _require(condition: bool, model: str, text: str) -> None:
    if not condition:
        raise InvariantError(f"{model}: {text}")
