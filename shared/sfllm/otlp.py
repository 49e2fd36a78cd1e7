"""Spans of this process, sent to an OpenTelemetry collector by OTLP over HTTP.

Whatever happens to the collector, nobody waits for it: spans go to a bounded queue that a thread empties,
and those that find it full are dropped. Times are given on the monotonic clock, in seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from importlib.metadata import version

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from sfllm.traceparent import TraceParent, parse

QUEUE_SPANS = 4096
BATCH_SPANS = 256
EXPORT_INTERVAL_SECONDS = 1.0
EXPORT_TIMEOUT_SECONDS = 5.0
FLUSH_SECONDS = 2.0
"""How long `close` waits for the last spans to be taken."""

Attributes = Mapping[str, str | bool | int | float | list[str]]

log = structlog.get_logger()


class Tracer:
    """Makes spans and owns the thread that sends them, from construction until `close`.

    `endpoint` is the base address of a collector, `sample_rate` the share of traces begun here that are
    recorded; a trace that began elsewhere is recorded if that was decided there. Any thread may call it.
    """

    def __init__(self, endpoint: str, sample_rate: float, service: str, instance: str) -> None:
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_SECONDS)
        self._processor = BatchSpanProcessor(
            exporter,
            max_queue_size=QUEUE_SPANS,
            schedule_delay_millis=EXPORT_INTERVAL_SECONDS * 1000,
            max_export_batch_size=BATCH_SPANS,
        )
        resource = Resource.create(
            {
                "service.name": f"sfllm-{service}",
                "service.namespace": "sfllm",
                "service.instance.id": instance,
                "service.version": version("sfllm"),
            }
        )
        sampler = ParentBased(TraceIdRatioBased(sample_rate))
        provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("sfllm", version("sfllm"))

    def begin(self, name: str, traceparent: str, started: float, attributes: Attributes) -> OpenSpan:
        """A span for a request that came from outside, perhaps with a trace of its own."""
        return OpenSpan(self, self._start(name, traceparent, SpanKind.SERVER, started, attributes))

    def record(
        self,
        name: str,
        traceparent: str,
        started: float,
        ended: float,
        attributes: Attributes,
        problem: str = "",
    ) -> None:
        """A span that is over, below the one that `traceparent` names. `problem` is why it failed."""
        span = self._start(name, traceparent, SpanKind.INTERNAL, started, attributes)
        if problem:
            span.set_status(StatusCode.ERROR, problem)
        span.end(_unix_nanoseconds(ended))

    def close(self) -> None:
        """Send what is left, for `FLUSH_SECONDS` at most."""
        # The SDK's own timeouts do not hold: its thread is left behind if the collector does not answer.
        thread = threading.Thread(target=self._processor.shutdown, name="tracer flush", daemon=True)
        thread.start()
        thread.join(FLUSH_SECONDS)
        if thread.is_alive():
            log.warning("the collector of traces did not take the last spans", seconds=FLUSH_SECONDS)

    def _start(
        self, name: str, traceparent: str, kind: SpanKind, started: float, attributes: Attributes
    ) -> Span:
        return self._tracer.start_span(
            name, _context(traceparent), kind, attributes, start_time=_unix_nanoseconds(started)
        )


class OpenSpan:
    """A span that goes on until `end`. `traceparent` is what belongs below it is given."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        context = span.get_span_context()
        parent = TraceParent(context.trace_id, context.span_id, context.trace_flags.sampled)
        self.traceparent = str(parent)
        self.trace_id = f"{context.trace_id:032x}"

    def rename(self, name: str) -> None:
        """Give it a name that says more."""
        self._span.update_name(name)

    def set(self, attributes: Attributes) -> None:
        """Add attributes."""
        self._span.set_attributes(attributes)

    def child(
        self, name: str, started: float, ended: float, attributes: Attributes, problem: str = ""
    ) -> None:
        """A span below this one that is over."""
        self._tracer.record(name, self.traceparent, started, ended, attributes, problem)

    def end(self, problem: str = "") -> None:
        """It is over now. `problem` is why it failed."""
        if problem:
            self._span.set_status(StatusCode.ERROR, problem)
        self._span.end()


def _context(traceparent: str) -> Context:
    """What a span begins in: below the span that is named, or in a trace of its own."""
    parent = parse(traceparent)
    if parent is None:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if parent.sampled else TraceFlags.DEFAULT)
    context = SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(context), Context())


def _unix_nanoseconds(at: float) -> int:
    """A time of the monotonic clock as the time of day."""
    return time.time_ns() - int((time.monotonic() - at) * 1e9)
