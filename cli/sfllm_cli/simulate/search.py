"""The load with the best goodput: a few loads around the capacity, then some between them. Pure."""

from __future__ import annotations

from collections.abc import Callable

FIRST_LOADS = (0.6, 0.8, 1.0, 1.2, 1.4)
FINER_STEPS = (0.1, 0.05)


def best_load(goodput: Callable[[float], float]) -> float:
    """The best of the loads that were tried, the lowest one if several are as good.

    Goodput grows with the load until queues make requests late, and then falls or stays: each round looks
    on both sides of the best load so far, half as far away as the round before.
    """
    found = {load: goodput(load) for load in FIRST_LOADS}
    for step in FINER_STEPS:
        middle = _best(found)
        for load in (round(middle - step, 2), round(middle + step, 2)):
            if load not in found:
                found[load] = goodput(load)
    return _best(found)


def _best(found: dict[float, float]) -> float:
    return min(found, key=lambda load: (-found[load], load))
