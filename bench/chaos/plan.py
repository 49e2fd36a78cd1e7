"""What is broken when: drawn from a seed, so that a run can be repeated. Pure: times are given."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

FaultKind = Literal["kill", "stop", "restart", "hold", "cut", "delay", "throttle"]

OF_LINKS: frozenset[FaultKind] = frozenset({"hold", "cut", "delay", "throttle"})
WEIGHTS: dict[FaultKind, int] = {
    "kill": 4,
    "stop": 4,
    "restart": 3,
    "hold": 3,
    "cut": 2,
    "delay": 1,
    "throttle": 1,
}
FIRST_AT_SECONDS = 2.0
SLOWEST_BYTES_PER_SECOND = 4000


class PlannedFault(NamedTuple):
    """At `at` seconds do `kind` to `target`, for `seconds` where it lasts.

    `amount` is a delay in seconds, or bytes a second for "throttle".
    """

    at: float
    kind: FaultKind
    target: str
    seconds: float
    amount: float

    def __str__(self) -> str:
        lasts = f" for {self.seconds:.2f} s" if self.seconds else ""
        amount = f" ({self.amount:.4g})" if self.amount else ""
        return f"{self.at:7.1f} s  {self.kind:8} {self.target}{lasts}{amount}"


def make_plan(
    rng: random.Random, targets: Sequence[str], seconds: float, every: float, lease_seconds: float
) -> list[PlannedFault]:
    """Faults from the first seconds until `seconds`, on average one in `every` seconds.

    Half of what lasts is longer than a lease, so that the other side gives up, and half is shorter.
    Nothing begins at a target before its last fault is well over, so that streams go on in between.
    """
    plan: list[PlannedFault] = []
    free_at = dict.fromkeys(targets, 0.0)
    for at in _times(rng, seconds, every):
        kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        able = [name for name in targets if free_at[name] <= at]
        if kind in OF_LINKS:
            able = [name for name in able if name != "scheduler"]
        if not able:
            continue
        target = rng.choice(able)
        lasts = 0.0
        if kind not in {"kill", "restart"}:
            longer = rng.random() < 0.5
            lasts = lease_seconds * (rng.uniform(1.3, 3.0) if longer else rng.uniform(0.1, 0.9))
        amount = 0.0
        if kind == "delay":
            amount = rng.uniform(0.05, lease_seconds / 2)
        elif kind == "throttle":
            amount = float(rng.randrange(SLOWEST_BYTES_PER_SECOND, 10 * SLOWEST_BYTES_PER_SECOND))
        plan.append(PlannedFault(at, kind, target, lasts, amount))
        free_at[target] = at + lasts + 2 * lease_seconds
    return plan


def _times(rng: random.Random, seconds: float, every: float) -> Iterator[float]:
    at = FIRST_AT_SECONDS
    while at < seconds:
        yield at
        at += rng.expovariate(1 / every)
