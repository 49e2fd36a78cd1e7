from __future__ import annotations

import json
import socket
import sys
import time
import urllib.request

import pytest
from otlp_receiver import OtlpReceiver
from running_stack import RunningStack

from sfllm.otlp import EXPORT_TIMEOUT_SECONDS, QUEUE_SPANS, Tracer
from sfllm.settings import CommonSettings
from sfllm.tracing import open_tracer

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


def test_without_an_endpoint_nothing_that_makes_spans_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # every process names what it imports
    stack = RunningStack("--mock")
    try:
        stack.wait_until_ready()
        request = urllib.request.Request(
            f"{stack.url}/v1/completions",
            json.dumps({"prompt": "Once", "max_tokens": 2}).encode(),
            {"Content-Type": "application/json", "traceparent": PARENT},
        )
        urllib.request.urlopen(request, timeout=60).close()
        lines = stack.log_lines()
    finally:
        code = stack.stop()
    assert code == 0
    imported = {
        (line.partition(" ")[0], line.rpartition("|")[2].strip()) for line in lines if "import time:" in line
    }
    modules = {module for _, module in imported}
    assert modules >= {"sfllm_gateway.traces", "sfllm_scheduler.traces", "sfllm_worker.traces"}
    assert "sfllm.otlp" not in modules
    found = {(process, module) for process, module in imported if module.startswith("opentelemetry.")}
    assert {process for process, _ in found} <= {"gateway-0"}, "FastAPI imports the interface by itself"
    assert not [name for _, name in found if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]


def test_spans_that_are_left_are_sent_when_a_tracer_closes(receiver: OtlpReceiver) -> None:
    tracer = Tracer(receiver.url + "/", 1.0, "gateway", "g-1")
    now = time.monotonic()
    tracer.record("queue", PARENT, now - 2.0, now - 0.5, {"sfllm.attempt": 3}, "lost")
    tracer.close()
    (span,) = receiver.of(TRACE)
    assert (span.name, span.parent_id, span.failed) == ("queue", "00f067aa0ba902b7", True)
    assert span.ended - span.started == pytest.approx(1.5, abs=0.01)
    assert span.attributes == {"sfllm.attempt": 3}
    assert span.resource["service.instance.id"] == "g-1"


def test_nobody_waits_for_a_collector_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracer = Tracer(f"http://127.0.0.1:{silent.getsockname()[1]}", 1.0, "worker", "w-1")
        began = time.monotonic()
        for _ in range(2 * QUEUE_SPANS):
            tracer.record("decode", PARENT, began, began, {})
        tracer.close()
        # Waiting for the collector would take the timeout for each of dozens of batches.
        assert time.monotonic() - began < 6 * EXPORT_TIMEOUT_SECONDS


def test_the_share_of_traces_that_begin_here_can_be_none(receiver: OtlpReceiver) -> None:
    tracer = Tracer(receiver.url, 0.0, "gateway", "g-1")
    spans = [tracer.begin("chat", "", time.monotonic(), {}) for _ in range(50)]
    for span in spans:
        assert span.traceparent.endswith("-00")
        span.child("tokenize", time.monotonic(), time.monotonic(), {})
        span.end()
    tracer.close()
    assert not [span for span in spans if receiver.of(span.trace_id)]


def test_tracing_that_is_not_installed_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sfllm.otlp", None)
    settings = CommonSettings(otlp_endpoint="http://127.0.0.1:4318")
    with pytest.raises(ValueError, match=r"--otlp-endpoint needs pip install 'sfllm\[tracing\]'"):
        open_tracer(settings, "worker", "w-1")
    assert open_tracer(CommonSettings(), "worker", "w-1") is None
