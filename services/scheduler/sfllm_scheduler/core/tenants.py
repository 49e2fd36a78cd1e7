"""Fairness between tenants by tokens served.

"Fairness in Serving Large Language Models" (Sheng and others, OSDI 2024): a virtual counter per tenant
counts the service it had, a prompt token as 1 and an output token as 2, and the tenant with the least goes
next (virtual token counter, VTC). Three things differ:

- A request is charged when it is granted, its output as expected, and corrected when it has ended: the
  scheduler does not look into streams.
- Tenants that are within `FAIRNESS_TOKENS` of the least served one count as equal, so that cohorts of
  like lengths can be made of many tenants with a request each. The service of two tenants that always have
  something waiting differs by no more than that and what one of them is granted at a time (over their
  weights); the paper's own bound, a worker's whole batch, is of the same kind.
- A tenant that comes back when others wait is lifted to the least served of them, as in the paper; when
  nobody waits, to where the last one served stood (the virtual time of start-time fair queueing, Goyal and
  others, SIGCOMM 1996). So nobody saves up service while idle.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from sfllm_scheduler.core.requests import Request

OUTPUT_WEIGHT = 2.0
FAIRNESS_TOKENS = 8192.0
MAX_TENANTS = 16384
"""Counters that are remembered: of the tenants that were served last."""


class Tenants:
    """Virtual counters of the tenants of one model, in tokens over the tenant's weight (1 unless given)."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._served: OrderedDict[str, float] = OrderedDict()
        self._level = 0.0

    def __len__(self) -> int:
        return len(self._served)

    def served(self, tenant: str) -> float:
        """What it had so far; one that is not remembered is where the last one served stood."""
        return self._served.get(tenant, self._level)

    def lift(self, tenant: str, least: float | None) -> float:
        """A tenant begins to wait; `least` is the least served that waits beside it. Its counter."""
        served = max(self._served.get(tenant, 0.0), self._level if least is None else least)
        self._set(tenant, served)
        return served

    def charge(self, tenant: str, request: Request) -> None:
        """A request was granted: count its uncached prompt and the output to be expected."""
        self._level = max(self._level, self.served(tenant))
        self.adjust(tenant, request, request.uncached + OUTPUT_WEIGHT * request.expected_output)

    def adjust(self, tenant: str, request: Request, tokens: float) -> None:
        """A request has had so many tokens more, or less, than its tenant was charged."""
        request.charged += tokens
        self._set(tenant, max(0.0, self.served(tenant) + tokens / self._weights.get(tenant, 1.0)))

    def _set(self, tenant: str, served: float) -> None:
        self._served[tenant] = served
        self._served.move_to_end(tenant)
        if len(self._served) > MAX_TENANTS:
            self._served.popitem(last=False)
