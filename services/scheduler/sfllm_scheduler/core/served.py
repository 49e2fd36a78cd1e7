"""What the end of a request teaches: how long outputs are, how fast workers go, what tenants have used."""

from __future__ import annotations

from sfllm.messages import Finished
from sfllm_scheduler.core.requests import Request
from sfllm_scheduler.core.state import State

NATURAL_ENDS = ("stop", "length")


def note_finished(state: State, request: Request, end: Finished, now: float) -> None:
    """A choice of a running request has ended. What a worker says counts within the bounds of the request."""
    model = state.models.get(request.model)
    if model is None:
        return
    limit = request.submit.sampling.max_tokens
    before = request.submit.generated_counts[request.submit.choices.index(end.choice)]
    total = min(max(end.generated_tokens, 0), limit)
    generated = max(0, total - before)
    if end.reason in NATURAL_ENDS:
        model.outputs.learn(request.prompt_band, limit, total)
        prefilled = min(end.prompt_tokens - end.cached_tokens, model.card.max_model_len)
        timings = end.timings
        model.pace.note(prefilled, timings.prefill_seconds, generated, timings.decode_seconds)
    model.waiting.settle(request, generated - request.expected_of(before))
    state.limits.correct(request.submit.tenant, total - request.expected_of(0), now)
