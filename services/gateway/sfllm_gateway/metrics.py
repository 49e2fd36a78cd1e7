"""What the gateway measures. Values are bound to a model once a request, not once a token."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict

from prometheus_client import Counter, Histogram

from sfllm.messages import Timings
from sfllm.metrics import (
    FIRST_TOKEN_BUCKETS,
    REQUEST_LATENCY_BUCKETS,
    TOKEN_COUNT_BUCKETS,
    TOKEN_LATENCY_BUCKETS,
    Metrics,
)

DELAY_PROBE_SECONDS = 0.25
CHOICE_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 128.0)
MODEL = ("model_name",)
REASONS = ("stop", "length", "abort", "error")
KEPT_MODELS = 64
"""Models whose values are kept, so that a gateway that outlives many models does not grow."""


class GatewayMetrics:
    """The gateway's metrics in `registry`."""

    def __init__(self, registry: Metrics) -> None:
        self.registry = registry
        self._models: OrderedDict[str, None] = OrderedDict()
        counter, histogram = registry.counter, registry.histogram
        self.http_requests = counter(
            "http_requests_total", "HTTP requests answered", ("method", "status", "handler")
        )
        self.disconnected = counter("disconnected_clients_total", "clients that left before their answer")
        self.ignored_fields = counter("ignored_fields_total", "unknown request fields that had no effect")
        self.idempotent_replays = counter(
            "idempotent_replays_total", "answers that were sent again to a retry with an idempotency key"
        )
        self.prompt_tokens = counter("prompt_tokens_total", "prompt tokens of admitted requests", MODEL)
        self.generation_tokens = counter("generation_tokens_total", "tokens generated", MODEL)
        self.success = counter(
            "request_success_total", "choices that ended, by reason", ("model_name", "finished_reason")
        )
        self.migrations = counter(
            "request_migrations_total", "times a running request was submitted again", MODEL
        )
        self.open_requests = registry.gauge("gateway_open_requests", "generation requests open at the moment")
        self.schedulers = registry.gauge(
            "gateway_schedulers_connected", "schedulers that answer this gateway"
        )
        self.journal_bytes = registry.gauge(
            "gateway_journal_bytes",
            "bytes that open requests may come to hold",
        )
        self.first_token = histogram(
            "time_to_first_token_seconds", "arrival to first token", FIRST_TOKEN_BUCKETS, MODEL
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds",
            "time between tokens, one observation for the tokens that arrived together",
            TOKEN_LATENCY_BUCKETS,
            MODEL,
        )
        self.per_output_token = histogram(
            "request_time_per_output_token_seconds",
            "mean time of a request's tokens after the first",
            TOKEN_LATENCY_BUCKETS,
            MODEL,
        )
        self.end_to_end = self._latency("e2e_request_latency_seconds", "arrival to last token")
        self.prompt_lengths = histogram(
            "request_prompt_tokens", "prompt tokens of a request", TOKEN_COUNT_BUCKETS, MODEL
        )
        self.generation_lengths = histogram(
            "request_generation_tokens", "tokens generated for a request", TOKEN_COUNT_BUCKETS, MODEL
        )
        self.longest_choices = histogram(
            "request_max_num_generation_tokens",
            "tokens generated for the longest choice of a request",
            TOKEN_COUNT_BUCKETS,
            MODEL,
        )
        self.params_n = histogram("request_params_n", "choices asked for", CHOICE_BUCKETS, MODEL)
        self.queue_time = self._latency("request_queue_time_seconds", "time in the scheduler's queue")
        self.prefill_time = self._latency("request_prefill_time_seconds", "time until the prompt was read")
        self.decode_time = self._latency("request_decode_time_seconds", "time from first to last token")
        self.inference_time = self._latency("request_inference_time_seconds", "prefill and decode together")
        self.loop_delay = histogram(
            "event_loop_delay_seconds", "how late the event loop runs a timer", TOKEN_LATENCY_BUCKETS
        )

        self._by_model: tuple[Counter | Histogram, ...] = (
            *(self.prompt_tokens, self.generation_tokens, self.migrations, self.params_n),
            *(self.first_token, self.inter_token, self.per_output_token, self.end_to_end),
            *(self.prompt_lengths, self.generation_lengths, self.longest_choices),
            *(self.queue_time, self.prefill_time, self.decode_time, self.inference_time),
        )

    def use_model(self, model: str) -> None:
        """Note that a model is asked for; the one that was not for the longest time may lose its values."""
        if model not in self._models:
            for reason in REASONS:  # a rate of errors is 0 before the first, rather than unknown
                self.success.labels(model, reason)
        self._models[model] = None
        self._models.move_to_end(model)
        if len(self._models) > KEPT_MODELS:
            forgotten, _ = self._models.popitem(last=False)
            for metric in self._by_model:
                with contextlib.suppress(KeyError):  # it never had a value
                    metric.remove(forgotten)
            for reason in REASONS:
                with contextlib.suppress(KeyError):
                    self.success.remove(forgotten, reason)

    def _latency(self, name: str, text: str) -> Histogram:
        return self.registry.histogram(name, text, REQUEST_LATENCY_BUCKETS, MODEL)

    def observe_timings(self, model: str, timings: Timings) -> None:
        """The stages of a finished request, as its worker measured them."""
        self.queue_time.labels(model).observe(timings.queue_seconds)
        self.prefill_time.labels(model).observe(timings.prefill_seconds)
        self.decode_time.labels(model).observe(timings.decode_seconds)
        self.inference_time.labels(model).observe(timings.prefill_seconds + timings.decode_seconds)


class LoopDelayProbe:
    """Measures how late the running event loop is, until `close`."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._observe = metrics.loop_delay.observe
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + DELAY_PROBE_SECONDS
        self._timer = self._loop.call_at(self._due, self._probe)

    def close(self) -> None:
        """Stop measuring."""
        self._timer.cancel()

    def _probe(self) -> None:
        self._observe(max(self._loop.time() - self._due, 0.0))
        self._due = self._loop.time() + DELAY_PROBE_SECONDS
        self._timer = self._loop.call_at(self._due, self._probe)
