"""A bound on what all open requests may come to hold: bodies, prompts, tokens, log probabilities. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.generation import Generation

TOKEN_BYTES = 4
CANDIDATE_BYTES = 8
"""The id and the log probability of one candidate."""

NUMBER_BYTES = 32
"""One number of an embedding, as Python holds it."""

CHOICE_BYTES = 4096
"""What a choice costs here before its first token."""


def journal_bytes(generation: Generation) -> int:
    """The most bytes that the journals of a request can come to.

    Log probabilities of the prompt count once a choice, since the answer repeats them with each.
    """
    total = 0
    for prompt, sampling in zip(generation.prompts, generation.samplings, strict=True):
        candidates = CANDIDATE_BYTES * (sampling.logprobs + 1)
        prompt_candidates = CANDIDATE_BYTES * (sampling.prompt_logprobs + 1)
        total += len(prompt) * (TOKEN_BYTES + generation.n * prompt_candidates) + len(sampling.grammar)
        if sampling.pooling and generation.model.card.pooling is not None:
            total += NUMBER_BYTES * generation.model.card.pooling.dimensions
        total += generation.n * (CHOICE_BYTES + sampling.max_tokens * (TOKEN_BYTES + candidates))
    return total


class JournalBudget:
    """Bytes that open requests hold or may come to. Invariant: `reserved` is their sum, at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reserved = 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """One request's share, given back at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            self.reserved -= share.size


class Share:
    """What one request has reserved: `size` bytes, for its body and then for its journals."""

    def __init__(self, budget: JournalBudget) -> None:
        self.size = 0
        self._budget = budget

    def grow(self, size: int) -> None:
        """Reserve more for a body. Raises 429 when others have it, 413 when nobody could have so much."""
        if self.size + size > self._budget.limit:
            raise ServiceError(
                ErrorCode.BODY_TOO_LARGE, f"the body is larger than the {self._budget.limit} bytes of room"
            )
        self._resize(self.size + size)

    def exchange(self, generation: Generation) -> None:
        """Give back what the body took and reserve what the answer may need. Raises 429, or 400 as above."""
        size = journal_bytes(generation)
        if size > self._budget.limit:
            raise ServiceError(
                ErrorCode.INVALID_REQUEST,
                f"the answer may come to {size} bytes, more than the {self._budget.limit} that this server "
                f"keeps at once: lower {' or '.join(_causes(generation))}",
                param="max_tokens",
            )
        self._resize(size)

    def _resize(self, size: int) -> None:
        reserved = self._budget.reserved - self.size + size
        if reserved > self._budget.limit:
            raise ServiceError(
                ErrorCode.QUEUE_FULL,
                "this gateway keeps as much of open requests as it may",
                retry_after_seconds=1,
            )
        self._budget.reserved, self.size = reserved, size


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
