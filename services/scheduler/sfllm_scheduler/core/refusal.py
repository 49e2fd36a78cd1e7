"""Why a request is not taken: it contradicts itself, is too large, or would not be served in time."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from sfllm.errors import ErrorCode
from sfllm.messages import Submit
from sfllm.prefixes import CHUNK_TOKENS, MAX_PREFIXES
from sfllm.wire import Array
from sfllm_scheduler.core.drain_rate import LONGEST_RETRY_SECONDS
from sfllm_scheduler.core.rate_limits import RateLimits
from sfllm_scheduler.core.requests import Request
from sfllm_scheduler.core.state import Model

MAX_CHOICES = 1024
MAX_NAME_CHARACTERS = 256
HANDLE_LIMIT = 2**64
COUNT_LIMIT = 2**32


class RefusedError(Exception):
    """The request is answered with this error. `retry_after_seconds` is None when trying again is no use."""

    def __init__(self, code: ErrorCode, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_seconds = retry_after_seconds


def check_shape(message: Submit, arrays: Sequence[Array]) -> None:
    """Refuse what cannot be right, so that no later arithmetic has to doubt it. Raises `RefusedError`."""
    prompt, generated, prefixes = arrays
    choices, counts = message.choices, message.generated_counts
    sound = (
        len(prompt) > 0
        and 0 < len(choices) <= MAX_CHOICES
        and len(choices) == len(counts)
        and (len(choices) == 1 or len(set(choices)) == len(choices))
        and 0 <= min(choices) <= max(choices) < COUNT_LIMIT
        and min(counts) >= 0
        and sum(counts) == len(generated)
        and len(prefixes) <= min(MAX_PREFIXES, len(prompt) // CHUNK_TOKENS)
        and 0 <= message.handle < HANDLE_LIMIT
        and 0 <= message.attempt < COUNT_LIMIT
        and message.sampling.max_tokens >= 1
        and len(message.request_id) <= MAX_NAME_CHARACTERS
        and len(message.last_worker) <= MAX_NAME_CHARACTERS
        and len(message.tenant) <= MAX_NAME_CHARACTERS
        and len(message.traceparent) <= MAX_NAME_CHARACTERS
    )
    if not sound:
        raise RefusedError(ErrorCode.INVALID_REQUEST, "the request contradicts itself (counts and arrays)")


def check_in_time(model: Model, message: Submit, now: float) -> None:
    """Refuse a first attempt that would only wait until its deadline. Raises `RefusedError`.

    Only what is quite sure is refused: when more waits than the workers run at a time, and when it is
    known how fast that goes.
    """
    at_once = model.fleet.slots
    if message.attempt > 0 or len(model.waiting) <= at_once:
        return
    before = model.waiting.before(message.priority)
    if before <= at_once:
        return
    wait = model.backlog.expected_wait(before, at_once, now)
    left = message.milliseconds_left / 1000
    if wait is not None and wait > left:
        raise RefusedError(
            ErrorCode.QUEUE_FULL,
            f"{before} requests go first, which takes about {wait:.0f} s; the deadline is in {left:.0f} s",
            float(min(max(ceil(wait - left), 1), LONGEST_RETRY_SECONDS)),
        )


def check_limits(limits: RateLimits, request: Request, now: float) -> None:
    """Count a first attempt against its tenant's limits. Raises `RefusedError` when they are used up.

    Its output counts as long as expected, and is corrected when it has ended.
    """
    if request.is_retry or not limits.any:
        return
    wait = limits.take(request.submit.tenant, request.tokens + request.expected_output, now)
    if wait > 0.0:
        raise RefusedError(
            ErrorCode.RATE_LIMIT_EXCEEDED,
            f"the limit of requests or tokens a minute is used up; try again in {ceil(wait)} s",
            float(ceil(wait)),
        )


def check_fits(model: Model, request: Request) -> None:
    """Refuse what is too large for the model or for every worker that it has. Raises `RefusedError`.

    A retry was not too large for the worker that it had, so it waits for such a worker to come back.
    """
    if request.longest >= model.card.max_model_len:
        raise RefusedError(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f"{request.longest} tokens leave no room for output in the context of "
            f"{model.card.max_model_len} tokens of {model.card.name}",
        )
    if request.is_retry or not model.workers or request.longest < model.fleet.context_limit:
        return
    raise RefusedError(
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        f"{request.longest} tokens leave no room for output in the cache of any worker: "
        f"they take contexts of up to {model.fleet.context_limit} tokens",
    )
