"""A collector of traces as far as a test needs one: takes OTLP over HTTP and keeps the spans."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2

WAIT_SECONDS = 60


class ReceivedSpan(NamedTuple):
    """A span as it came, ids in hex, times in seconds of the day, with the resource that sent it."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    started: float
    ended: float
    failed: bool
    attributes: dict[str, Any]
    resource: dict[str, Any]

    @property
    def service(self) -> str:
        return self.resource["service.name"]


class OtlpReceiver:
    """Listens on a port of its own from construction until `close`."""

    def __init__(self) -> None:
        self._spans: list[ReceivedSpan] = []
        self._changed = threading.Condition()
        self.paths: set[str] = set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver._take(self.path, ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait_for(
        self, trace_id: str, complete: Callable[[list[ReceivedSpan]], bool], why: Callable[[], str]
    ) -> list[ReceivedSpan]:
        """The spans of a trace, by their beginnings, as soon as they are `complete`."""
        with self._changed:
            if not self._changed.wait_for(lambda: complete(self.of(trace_id)), WAIT_SECONDS):
                raise AssertionError(f"only {[span.name for span in self.of(trace_id)]} came\n{why()}")
            return sorted(self.of(trace_id), key=lambda span: span.started)

    def of(self, trace_id: str) -> list[ReceivedSpan]:
        return [span for span in self._spans if span.trace_id == trace_id]

    def _take(self, path: str, request: ExportTraceServiceRequest) -> None:
        with self._changed:
            self.paths.add(path)
            for batch in request.resource_spans:
                resource = _attributes(batch.resource.attributes)
                for scope in batch.scope_spans:
                    self._spans += [_received(span, resource) for span in scope.spans]
            self._changed.notify_all()


def _received(span: trace_pb2.Span, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.kind,
        span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9,
        span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        _attributes(span.attributes),
        resource,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)
