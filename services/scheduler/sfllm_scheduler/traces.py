"""The scheduler's spans: how long each attempt of a traced request was in the queue, and how that ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sfllm.messages import Grant
from sfllm_scheduler.core.events import Field

if TYPE_CHECKING:
    from sfllm.otlp import Attributes, Tracer


class QueueSpans:
    """Makes a span `queue` for what leaves the queue: granted to a worker, cancelled or rejected."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def granted(self, worker: bytes, grant: Grant, now: float) -> None:
        """A worker, whose routing id is its name, has been sent these requests."""
        for request in grant.requests:
            if request.traceparent:
                attributes: Attributes = {
                    "sfllm.request_id": request.request_id,
                    "sfllm.attempt": request.attempt,
                    "sfllm.worker": worker.decode("ascii", "replace"),
                    "sfllm.cohort_requests": len(grant.requests),
                }
                started = now - request.queue_seconds
                self._tracer.record("queue", request.traceparent, started, now, attributes)

    def ended(self, event: str, fields: Mapping[str, Field], now: float) -> None:
        """A request ended, as the core's record says. It has a span of its own already if it was granted."""
        waited, traceparent = fields.get("waited_seconds"), fields.get("traceparent")
        if isinstance(waited, float) and isinstance(traceparent, str):
            attributes = {"sfllm.request_id": str(fields["request_id"]), "sfllm.end": event}
            problem = str(fields["reason"]) if event == "rejected" else ""
            self._tracer.record("queue", traceparent, now - waited, now, attributes, problem)
