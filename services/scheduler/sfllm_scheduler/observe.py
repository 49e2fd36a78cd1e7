"""The scheduler's metrics and log lines, made from the core's records and tables."""

from __future__ import annotations

from collections import Counter as CountOf
from collections.abc import Mapping
from logging import DEBUG, ERROR, INFO, WARNING, getLogger

import structlog

from sfllm.bands import band_end
from sfllm.metrics import REQUEST_LATENCY_BUCKETS, Metrics
from sfllm.traceparent import log_fields
from sfllm_scheduler.core.events import Field, Record
from sfllm_scheduler.core.leases import CRASHES
from sfllm_scheduler.core.state import State

log = structlog.get_logger()

REFRESH_SECONDS = 0.5
SPREAD_BUCKETS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0)
COHORT_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)

_LEVELS = {
    "rejected": INFO,
    "quarantined": ERROR,
    "interrupted": WARNING,
    "worker_joined": INFO,
    "worker_draining": INFO,
    "worker_lost": WARNING,
    "worker_failed": ERROR,
    "worker_refused": WARNING,
    "gateway_joined": INFO,
    "gateway_lost": INFO,
}
"""Everything else is for debugging."""


REASONS = ("capacity", "no_worker", "suspect")
"""What requests in the queue wait for: room, a worker that serves their model, the end of a trial."""


class Observer:
    """Turns records into log lines and measurements, and reads gauges from the tables now and then."""

    def __init__(self, metrics: Metrics) -> None:
        self._running = metrics.gauge("num_requests_running", "Requests that workers hold.", ["model_name"])
        self._waiting = metrics.gauge("num_requests_waiting", "Requests in the queue.", ["model_name"])
        self._reasons = metrics.gauge(
            "num_requests_waiting_by_reason",
            "Requests in the queue by what they wait for.",
            ["model_name", "reason"],
        )
        self._bands = metrics.gauge(
            "queue_depth", "Requests in the queue by the longest length of their band.", ["band"]
        )
        self._workers = metrics.gauge("workers", "Workers by state.", ["state"])
        self._rejections = metrics.counter(
            "admission_rejections_total", "Requests ended with an error by the scheduler.", ["reason"]
        )
        self._migrations = metrics.counter(
            "request_migrations_total", "Attempts that were interrupted and may go on elsewhere.", ["cause"]
        )
        self._losses = metrics.counter("worker_losses_total", "Workers that went away.", ["cause"])
        # From 0 on, so that the first one is an increase to Prometheus.
        for cause in (*sorted(CRASHES), "drain"):
            self._losses.labels(cause)
        self._sent_away = metrics.counter(
            "worker_refusals_total", "Workers sent away, as others serve another model by that name."
        )
        self._quarantined = metrics.counter(
            "quarantined_requests_total", "Requests that were alone on a worker at two crashes."
        )
        self._on_trial = metrics.gauge(
            "requests_on_trial", "Running requests that a worker may have crashed of lately."
        )
        self._reconciled = metrics.counter(
            "reconciliations_total",
            "Open choices in which a peer's list differed, by what was the case.",
            ["kind"],
        )
        self._refused = metrics.counter(
            "scheduler_links_refused_total", "Connections refused for keys missing or unknown.", ["socket"]
        )
        for socket in ("gateway", "worker", "asset"):
            self._refused.labels(socket)
        self._malformed = metrics.counter(
            "malformed_messages_total", "Messages that were not what the link allows.", ["link"]
        )
        for link in ("gateway", "worker"):
            self._malformed.labels(link)
        self._dropped = metrics.counter("stale_messages_total", "Late messages of workers, dropped.")
        self._spread = metrics.histogram(
            "batch_length_spread", "Longest over shortest prompt in a granted cohort.", SPREAD_BUCKETS
        )
        self._cohort_size = metrics.histogram(
            "cohort_size_requests", "Requests granted to a worker together.", COHORT_BUCKETS
        )
        self._granted_tokens = metrics.counter(
            "prefix_granted_tokens_total", "Tokens of requests when they were granted.", ["model_name"]
        )
        self._expected_hits = metrics.counter(
            "prefix_expected_cached_tokens_total",
            "Those of them that the worker was expected to have in its cache.",
            ["model_name"],
        )
        self._recalls = metrics.counter(
            "recalls_total", "Requests that a busy worker was asked to give back unstarted."
        )
        self._outstanding = metrics.gauge(
            "outstanding_prefill_tokens",
            "Tokens that workers were granted and have not prefilled, at most one step's of each request.",
            ["model_name"],
        )
        self._queue_time = metrics.histogram(
            "request_queue_time_seconds", "Time in the queue.", REQUEST_LATENCY_BUCKETS, ["model_name"]
        )
        self._counted = {
            "recalled": self._recalls,
            "quarantined": self._quarantined,
            "dropped": self._dropped,
            "worker_refused": self._sent_away,
        }
        self._seen_bands: set[int] = set()
        self._seen_models: set[str] = set()
        self._next_refresh = 0.0
        self._debugs = getLogger().isEnabledFor(DEBUG)  # asked once: there are several records a request

    def count_refused(self, socket: str, count: int) -> None:
        """Connections were turned away."""
        self._refused.labels(socket).inc(count)

    def count_malformed(self, link: str) -> None:
        """A frame was not a message of that link."""
        self._malformed.labels(link).inc()

    def record(self, record: Record) -> None:
        """Log and measure one record of the core."""
        fields = record.fields
        match record.event:
            case "granted":
                self._measure_grant(fields)
            case "rejected":
                self._rejections.labels(str(fields["reason"])).inc()
            case "interrupted":
                self._migrations.labels(str(fields["cause"])).inc()
            case "worker_lost":
                self._losses.labels(str(fields["cause"])).inc()
            case "reconciled":
                for difference in ("lost", "unwanted"):
                    kind = f"{fields['link']}_{difference}"
                    self._reconciled.labels(kind).inc(_number(fields[difference]))
            case "malformed":
                self.count_malformed(str(fields["link"]))
            case _ if record.event in self._counted:
                self._counted[record.event].inc()
        level = _LEVELS.get(record.event, DEBUG)
        if level > DEBUG or self._debugs:
            log.log(level, record.event.replace("_", " "), **_shown(fields))

    def _measure_grant(self, fields: Mapping[str, Field]) -> None:
        self._spread.observe(_number(fields["spread"]))
        model = str(fields["model"])
        self._granted_tokens.labels(model).inc(_number(fields["tokens"]))
        self._expected_hits.labels(model).inc(_number(fields["cached_tokens"]))
        seconds = fields["queue_seconds"]
        waits = seconds if isinstance(seconds, tuple) else ()
        self._cohort_size.observe(len(waits))
        queue_time = self._queue_time.labels(model)
        for value in waits:
            queue_time.observe(value)

    def refresh(self, state: State, now: float) -> None:
        """Read the gauges, at most twice a second: that is often enough for any scrape."""
        if now < self._next_refresh:
            return
        self._next_refresh = now + REFRESH_SECONDS
        bands: CountOf[int] = CountOf()
        for name, model in state.models.items():
            self._waiting.labels(name).set(len(model.waiting))
            held = sum(len(worker.holds) for worker in model.workers.values())
            self._running.labels(name).set(held)
            outstanding = sum(worker.prefill.tokens for worker in model.workers.values())
            self._outstanding.labels(name).set(outstanding)
            ordinary, served = model.waiting.ordinary_count, bool(model.fleet.serving)
            self._reasons.labels(name, "suspect").set(len(model.waiting.suspects))
            self._reasons.labels(name, "capacity").set(ordinary if served else 0)
            self._reasons.labels(name, "no_worker").set(0 if served else ordinary)
            bands.update(model.waiting.by_band)
        self._seen_bands |= set(bands)
        for band in self._seen_bands:
            self._bands.labels(str(band_end(band))).set(bands[band])
        for name in self._seen_models - set(state.models):
            self._waiting.remove(name)
            self._running.remove(name)
            self._outstanding.remove(name)
            for reason in REASONS:
                self._reasons.remove(name, reason)
        self._seen_models = set(state.models)
        self._on_trial.set(sum(len(worker.probation) for worker in state.workers.values()))
        draining = sum(worker.draining for worker in state.workers.values())
        self._workers.labels("draining").set(draining)
        self._workers.labels("serving").set(len(state.workers) - draining)


def _shown(fields: Mapping[str, Field]) -> Mapping[str, Field]:
    """The fields as a log line has them, with the id of the trace in place of its header."""
    if "traceparent" not in fields:
        return fields
    shown = dict(fields)
    return shown | log_fields(str(shown["request_id"]), str(shown.pop("traceparent")))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
