"""Prometheus metrics: names with the configured prefix, and the buckets that everyone shares.

A service makes one `Metrics` and registers what it owns; `docs/api-reference.md` lists them all.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

# A small model on a fast device makes a token in under a millisecond, so that buckets which start
# at 10 ms would say nothing of it.
TOKEN_LATENCY_BUCKETS = (
    *(0.00025, 0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5),
)
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
REQUEST_LATENCY_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0),
    *(30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
)
TOKEN_COUNT_BUCKETS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """A registry of this process's metrics, each with the prefix and the labels given."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        """A value that goes up and down."""
        return Gauge(self._prefix + name, text, labels, registry=self._registry)

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """A value that only grows; `name` ends in `_total`."""
        return Counter(self._prefix + name, text, labels, registry=self._registry)

    def histogram(
        self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        """A distribution over `buckets`."""
        return Histogram(self._prefix + name, text, labels, buckets=buckets, registry=self._registry)

    def links(self, *, encrypted: bool) -> None:
        """What every service tells of its links. Once for a registry."""
        self.gauge("links_encrypted", "1 if links between services are encrypted and know their peers").set(
            encrypted
        )

    def render(self) -> bytes:
        """The exposition text that `GET /metrics` answers with."""
        return generate_latest(self._registry)
