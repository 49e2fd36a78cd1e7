"""The invariants of a model's queue, checked by looking at everything in it."""

from __future__ import annotations

from collections import Counter

from sfllm_scheduler.core.banded import Banded
from sfllm_scheduler.core.lines import Line
from sfllm_scheduler.core.priority_class import PriorityClass
from sfllm_scheduler.core.requests import Rank
from sfllm_scheduler.core.waiting import WaitingRequests
from sfllm_scheduler.core.workers import InvariantError


def check_waiting(name: str, waiting: WaitingRequests) -> None:
    """Raise `InvariantError` for the first contradiction in the queue of the model of that name."""
    total = len(waiting.suspects)
    bands: Counter[int] = Counter()
    for group in waiting.in_order():
        _require(group.count > 0, f"{name}: an empty priority class")
        for tenant, line in group.lines.items():
            _require(line.tenant == tenant and line.count > 0, f"{name}: the line of {tenant!r} is empty")
            _check_line(f"{name}, {tenant!r}", line)
            bands.update(request.band for request in line.by_size.by_age())
        _require(group.count == sum(line.count for line in group.lines.values()), f"{name}: a class's count")
        _check_order_of_tenants(name, group)
        total += group.count
    urgency = [(request.priority, request.rank) for request in waiting.suspects]
    _require(urgency == sorted(set(urgency)), f"{name}: suspects out of order")
    _require(total - len(waiting.suspects) == waiting.ordinary_count, f"{name}: suspects are miscounted")
    _require(total == len(waiting), f"{name}: the queue's count is wrong")
    _require(bands == waiting.by_band, f"{name}: the counts of bands are wrong")


def _check_line(name: str, line: Line) -> None:
    ages = _ranks(line.by_size)
    _require(ages == sorted(set(ages)) and len(ages) == line.count, f"{name}: ages out of order")
    banded = sorted(_ranks(line.on_time) + _ranks(line.late))
    _require(banded == ages, f"{name}: bands and ages differ")
    _require(not any(request.late for request in line.on_time.by_age()), f"{name}: late among the others")
    _require(all(request.late for request in line.late.by_age()), f"{name}: others among the late")
    _require(line.overtakers == sorted(line.overtakers), f"{name}: overtakers out of order")


def _check_order_of_tenants(name: str, group: PriorityClass) -> None:
    """Open lines have their heads in the class's, parked ones do not; the least served one is open."""
    lines = group.lines.values()
    for late in (False, True):
        heads = {head for line in lines if not line.parked for head in line.banded(late=late).heads()}
        known = set(group.heads(late=late).by_age())
        _require(known == heads, f"{name}: the heads of a class are not those of its lines")
    parked = sorted((line.served, line.tenant) for line in lines if line.parked)
    _require(list(group.parked) == parked, f"{name}: parked lines out of order")
    least = min(lines, key=lambda line: (line.served, line.tenant))
    _require(not least.parked, f"{name}: the least served tenant is parked")


def _ranks(requests: Banded) -> list[Rank]:
    return [request.rank for request in requests.by_age()]


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise InvariantError(text)
