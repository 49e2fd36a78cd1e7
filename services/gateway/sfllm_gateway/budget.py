"""A bound on what all open requests may come to hold: their prompts, tokens and log probabilities. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.generation import Generation

TOKEN_BYTES = 4
CANDIDATE_BYTES = 8
"""The id and the log probability of one candidate."""


def journal_bytes(generation: Generation) -> int:
    """The most bytes that the journals of a request can come to.

    Log probabilities of the prompt count once a choice, since the answer repeats them with each.
    """
    total = 0
    for prompt, sampling in zip(generation.prompts, generation.samplings, strict=True):
        candidates = CANDIDATE_BYTES * (sampling.logprobs + 1)
        prompt_candidates = CANDIDATE_BYTES * (sampling.prompt_logprobs + 1)
        total += len(prompt) * (TOKEN_BYTES + generation.n * prompt_candidates)
        total += generation.n * sampling.max_tokens * (TOKEN_BYTES + candidates)
    return total


class JournalBudget:
    """Bytes reserved by open requests. Invariant: `reserved` is their sum, at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reserved = 0

    @contextmanager
    def reserve(self, generation: Generation) -> Iterator[None]:
        """Room for a request while it is open. Raises 429 when others have it, 400 when nobody could."""
        size = journal_bytes(generation)
        if size > self.limit:
            raise ServiceError(
                ErrorCode.INVALID_REQUEST,
                f"the answer may come to {size} bytes, more than the {self.limit} that this server keeps at "
                f"once: lower {' or '.join(_causes(generation))}",
                param="max_tokens",
            )
        if self.reserved + size > self.limit:
            raise ServiceError(
                ErrorCode.QUEUE_FULL,
                "this gateway keeps as much of open requests as it may",
                retry_after_seconds=1,
            )
        self.reserved += size
        try:
            yield
        finally:
            self.reserved -= size


def _causes(generation: Generation) -> list[str]:
    """The fields that make a request large, as far as it has them."""
    samplings = generation.samplings
    fields = {
        "max_tokens": True,
        "n": generation.n > 1,
        "prompt": len(samplings) > 1,
        "logprobs": any(sampling.logprobs >= 0 for sampling in samplings),
        "prompt_logprobs": any(sampling.prompt_logprobs >= 0 for sampling in samplings),
    }
    return [name for name, counts in fields.items() if counts]
