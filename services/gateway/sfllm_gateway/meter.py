"""What one request adds to the metrics and to the log."""

from __future__ import annotations

import time
from collections.abc import Sequence

import structlog

from sfllm.messages import Timings
from sfllm_gateway.generation import Usage
from sfllm_gateway.metrics import GatewayMetrics

log = structlog.get_logger()


class RequestMeter:
    """Measures one request that arrived at `arrived` (monotonic seconds)."""

    def __init__(self, metrics: GatewayMetrics, model: str, request_id: str, arrived: float) -> None:
        metrics.use_model(model)
        self._metrics = metrics
        self._model = model
        self._request_id = request_id
        self._arrived = arrived
        self._first_token_at: float | None = None
        self._inter_token = metrics.inter_token.labels(model)
        self._generation_tokens = metrics.generation_tokens.labels(model)

    def admitted(self, prompt_tokens: int, choices: int) -> None:
        """The scheduler took it."""
        self._metrics.prompt_tokens.labels(self._model).inc(prompt_tokens)
        self._metrics.params_n.labels(self._model).observe(choices)

    def tokens(self, count: int, seconds_since_last: float | None) -> None:
        """Tokens of one choice that came together, so long after its last ones (None: its first)."""
        self._generation_tokens.inc(count)
        if seconds_since_last is not None:
            self._inter_token.observe(seconds_since_last / count)
        elif self._first_token_at is None:
            self._first_token_at = time.monotonic()
            self._metrics.first_token.labels(self._model).observe(self._first_token_at - self._arrived)

    def client_left(self) -> None:
        """The client closed the connection, or takes nothing."""
        self._metrics.disconnected.inc()

    def ended(
        self,
        usage: Usage,
        reasons: Sequence[str],
        timings: Sequence[Timings],
        migrations: int,
        longest: int,
    ) -> None:
        """It is over. `reasons`, one a choice, are "stop", "length", "abort" or "error".

        `longest` are the tokens of its longest choice.
        """
        metrics, model = self._metrics, self._model
        seconds = time.monotonic() - self._arrived
        for reason in reasons:
            metrics.success.labels(model, reason).inc()
        metrics.migrations.labels(model).inc(migrations)
        for stages in timings:
            metrics.observe_timings(model, stages)
        if reasons and all(reason in {"stop", "length"} for reason in reasons):
            metrics.end_to_end.labels(model).observe(seconds)
            metrics.prompt_lengths.labels(model).observe(usage.prompt_tokens)
            metrics.generation_lengths.labels(model).observe(usage.completion_tokens)
            metrics.longest_choices.labels(model).observe(longest)
            if self._first_token_at is not None and usage.completion_tokens > len(reasons):
                after_first = seconds - (self._first_token_at - self._arrived)
                per_token = after_first * len(reasons) / (usage.completion_tokens - len(reasons))
                metrics.per_output_token.labels(model).observe(per_token)
        log.info(
            "request ended",
            request_id=self._request_id,
            model=model,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            reasons=sorted(set(reasons)),
            seconds=round(seconds, 4),
        )
