"""Limits per tenant as token buckets: requests and tokens a minute, with bursts of a minute's worth.

They are kept here because every gateway would otherwise allow the whole limit. A bucket that is full again
says nothing and is dropped, so memory holds tenants of the last minute or so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

MINUTE_SECONDS = 60.0
MAX_TENANTS = 65536
"""Beyond so many the one that has been quiet for longest is forgotten: it has its whole limit again."""


class Limits(NamedTuple):
    """What a tenant may use in a minute. None sets no limit."""

    requests: int | None
    tokens: int | None


class _Bucket:
    """What a tenant has left, as of `at`. `tokens` is negative when it used more than was expected."""

    __slots__ = ("at", "limits", "requests", "tokens")

    def __init__(self, limits: Limits, at: float) -> None:
        self.limits = limits
        self.requests = float(limits.requests or 0)
        self.tokens = float(limits.tokens or 0)
        self.at = at


class RateLimits:
    """Token buckets of all tenants. Those with limits of their own have these instead of the common ones."""

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        own: Mapping[str, Limits] | None = None,
    ) -> None:
        self._common = Limits(requests_per_minute, tokens_per_minute)
        self._own = dict(own or {})
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    @property
    def any(self) -> bool:
        """Whether there is a limit at all."""
        return bool(self._own) or self._common != Limits(None, None)

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, tenant: str, tokens: float, now: float) -> float:
        """Count a request of so many tokens: 0.0, or the seconds until it would be allowed.

        One that is larger than a minute's worth goes when the bucket is full, and leaves a debt.
        """
        limits = self._limits(tenant)
        if limits == Limits(None, None):
            return 0.0
        bucket = self._bucket(tenant, now)
        wait = 0.0
        if limits.requests is not None:
            wait = max(wait, _seconds_until(1.0, bucket.requests, limits.requests))
        if limits.tokens is not None:
            wait = max(wait, _seconds_until(min(tokens, limits.tokens), bucket.tokens, limits.tokens))
        if wait == 0.0:
            bucket.requests -= 1.0
            bucket.tokens -= tokens
        return wait

    def correct(self, tenant: str, tokens: float, now: float) -> None:
        """A request used so many tokens more (or less) than it was counted for."""
        limit = self._limits(tenant).tokens
        if limit is not None:
            bucket = self._bucket(tenant, now)
            bucket.tokens = min(bucket.tokens - tokens, float(limit))

    def _limits(self, tenant: str) -> Limits:
        return self._own.get(tenant, self._common)

    def _bucket(self, tenant: str, now: float) -> _Bucket:
        """The tenant's bucket as it is now. Two others are looked at in passing, so full ones do not stay."""
        for _ in range(2):
            oldest = next(iter(self._buckets), tenant)
            if oldest != tenant and (
                len(self._buckets) >= MAX_TENANTS or _refill(self._buckets[oldest], now)
            ):
                del self._buckets[oldest]
        bucket = self._buckets.get(tenant)
        if bucket is None:
            bucket = self._buckets[tenant] = _Bucket(self._limits(tenant), now)
        self._buckets.move_to_end(tenant)
        _refill(bucket, now)
        return bucket


def _refill(bucket: _Bucket, now: float) -> bool:
    """Add what time has brought; whether it is full."""
    minutes = max(0.0, now - bucket.at) / MINUTE_SECONDS
    bucket.at = max(now, bucket.at)
    requests, tokens = bucket.limits
    full = True
    if requests is not None:
        bucket.requests = min(requests, bucket.requests + minutes * requests)
        full = bucket.requests >= requests
    if tokens is not None:
        bucket.tokens = min(tokens, bucket.tokens + minutes * tokens)
        full = full and bucket.tokens >= tokens
    return full


def _seconds_until(wanted: float, left: float, per_minute: int) -> float:
    return max(0.0, wanted - left) * MINUTE_SECONDS / per_minute
