"""Where a slow server does less, so that a run ends within the hour. Pure.

Nobody that could be the best peer is cut short: the rules only meet those far behind one, and the table
says for each what it did not do.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from bench.peers.results import UNQUANTIZED, Row, is_ours
from bench.peers.workloads import SATURATED

from sfllm_cli.bench.rounds import Leg

SLOW_SHARE = 0.5
"""A peer below this share of the best one's tokens a second runs no further round of that workload."""
W4_SHARE = 0.25
"""A peer below this share of the best one on W2 does not run W4."""


def done_after(legs: Sequence[Leg], precisions: Mapping[str, str]) -> set[str]:
    """The servers whose rounds so far are enough: slow peers, and those that answer nothing.

    A peer at 16 bits is measured against the best at 16 bits, a quantized one against the best of all.
    """
    rates = {
        name: statistics.median(
            leg.figures.output_tokens_per_second for leg in legs if leg.server == name and leg.kept
        )
        for name in {leg.server for leg in legs}
    }

    def best_for(name: str) -> float:
        full = precisions[name] == UNQUANTIZED
        return max(
            rate
            for other, rate in rates.items()
            if not is_ours(other) and (not full or precisions[other] == UNQUANTIZED)
        )

    silent = {name for name, rate in rates.items() if rate == 0}
    return silent | {
        name for name in rates if not is_ours(name) and rates[name] < SLOW_SHARE * best_for(name)
    }


def why_not(server: str, group: str, rate: float | None, rows: Sequence[Row]) -> str | None:
    """Why a server does not run a workload of `group` after `rows`, or None; `rate` is that of requests."""
    if group != "W4":
        return None
    on_w2 = {each.server: each.tokens_per_second for each in rows if each.workload == "W2"}
    best = max((value for name, value in on_w2.items() if not is_ours(name)), default=0.0)
    if not is_ours(server) and server in on_w2 and on_w2[server] < W4_SHARE * best:
        return f"below {W4_SHARE:.0%} of the best peer on W2"
    capacity = {each.server: each.requests_per_second for each in rows if each.workload == SATURATED}
    if rate is not None and server in capacity and capacity[server] < rate:
        return f"its capacity is {capacity[server]:.2f} requests/s"
    return None
