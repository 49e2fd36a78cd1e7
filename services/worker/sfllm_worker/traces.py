"""The worker's spans of a traced request: waiting for room, prefill, decode."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sfllm_worker.ledger import HeldRequest

if TYPE_CHECKING:
    from sfllm.otlp import Attributes, Tracer


class StageSpans:
    """Makes the spans of each request that the worker of this name holds no more."""

    def __init__(self, tracer: Tracer, worker_id: str) -> None:
        self._tracer = tracer
        self._worker_id = worker_id

    def ended(self, held: HeldRequest) -> None:
        """A request ended just now, in whatever way; a problem was that of the stage that it was in.

        Choices of a request share its stages: prefill ends with the first token of any of them.
        """
        now = time.monotonic()
        begins = (
            ("wait for room", held.granted_at),
            ("prefill", held.admitted_at),
            ("decode", held.first_token_at),
        )
        stages = [(name, at) for name, at in begins if at is not None]
        ends = [*(at for _, at in stages[1:]), now]
        attributes: Attributes = {
            "sfllm.request_id": held.request_id,
            "sfllm.attempt": held.attempt,
            "sfllm.worker": self._worker_id,
            "sfllm.prompt_tokens": held.prompt_count,
            "sfllm.end": "cancelled" if held.open_choices and not held.problem else "finished",
        }
        problems = [*("" for _ in stages[1:]), held.problem]
        for (name, started), ended, problem in zip(stages, ends, problems, strict=True):
            self._tracer.record(name, held.traceparent, started, ended, attributes, problem)
