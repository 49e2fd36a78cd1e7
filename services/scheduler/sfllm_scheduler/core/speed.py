"""How fast a worker is, and how busy, in seconds, so that unlike workers can be compared."""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

from sfllm.messages import Capacity

DECODE_STEPS = 16.0
"""How many of a worker's steps of decode count as much as the wait for the first token.

A request meets the others of its worker at every step, so a crowd costs it something too; but a crowd thins
out while it stays, and counting all its steps would send everybody away from full workers that are fast.
"""

ASSUMED_STEP_SECONDS = 0.05
"""For a full step of a worker that has not measured any."""

CROWD_SHARE = 0.25
"""How much of a full step of such a worker's decode depends on who is in it; reading the weights does not."""

MAX_SECONDS = 3600.0
"""No honest step takes longer."""


class Speed(NamedTuple):
    """A worker's step in seconds: `base`, and so much for each row of decode and token of context.

    `prefill_token` is for each prompt token, its share of the base included, since a step with much
    prefill is full of it.
    """

    prefill_token: float
    base: float
    decode_row: float
    context_token: float

    @classmethod
    def unknown(cls, capacity: Capacity) -> Speed:
        """All workers that have measured nothing count alike: full steps take the same time."""
        token = ASSUMED_STEP_SECONDS / capacity.step_tokens
        crowd = ASSUMED_STEP_SECONDS * CROWD_SHARE
        return cls(token, 0.0, crowd / 2 / capacity.slots, crowd / 2 / capacity.kv_tokens)

    @classmethod
    def measured(cls, step_curve: tuple[float, ...], capacity: Capacity) -> Speed | None:
        """By a worker's step curve (`sfllm.step_curve`); None when it has none, or one that cannot be."""
        if len(step_curve) != 4 or not all(
            isfinite(part) and 0.0 <= part < MAX_SECONDS for part in step_curve
        ):
            return None
        base, prefill_token, decode_row, context_token = step_curve
        return cls(prefill_token + base / capacity.step_tokens, base, decode_row, context_token)

    def load(self, prefill_tokens: int, rows: int, context_tokens: int) -> float:
        """Seconds until a new prompt's turn comes, and what the sequences there cost it in decode."""
        step = self.base + self.decode_row * rows + self.context_token * context_tokens
        return prefill_tokens * self.prefill_token + DECODE_STEPS * step
