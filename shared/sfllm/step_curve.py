"""How long a worker's step takes: a sum of what it reads and computes, and a fit of it to measured steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

FEATURES = 4
FORGET = 0.998
"""A step counts half of the newest one after some 350 more: enough for all kinds, soon enough for changes."""

LEAST_STEPS = 8
DEGENERATE = 1e-9
"""Features that are so nearly a sum of others, as a share of their size, cannot be told apart."""


class StepCurve(NamedTuple):
    """Seconds of a step: `base`, and so much for each prompt token, row of decode and token of context.

    Context is what the attention of decode rows reads: the lengths of their sequences added up.
    """

    base_seconds: float
    per_prefill_token: float
    per_decode_row: float
    per_context_token: float

    def seconds(self, prefill_tokens: int, decode_rows: int, context_tokens: int) -> float:
        """What such a step takes."""
        return (
            self.base_seconds
            + self.per_prefill_token * prefill_tokens
            + self.per_decode_row * decode_rows
            + self.per_context_token * context_tokens
        )


class StepCurveFit:
    """Least squares over the steps so far, those long ago counting less, no part of it below zero.

    The best of all subsets of the four features is taken (Lawson and Hanson's problem, small enough for
    trying all): what the steps do not tell apart, such as rows and context of equal ones, one has all of.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._matrix = [[0.0] * FEATURES for _ in range(FEATURES)]
        self._vector = [0.0] * FEATURES

    def add(self, prefill_tokens: int, decode_rows: int, context_tokens: int, seconds: float) -> None:
        """A step was measured. Long ones count no more than short ones: errors are relative."""
        if seconds <= 0.0:
            return
        features = [part / seconds for part in (1.0, prefill_tokens, decode_rows, context_tokens)]
        for row, value in enumerate(features):
            line = self._matrix[row]
            for column in range(FEATURES):
                line[column] = line[column] * FORGET + value * features[column]
            self._vector[row] = self._vector[row] * FORGET + value
        self.steps += 1

    def curve(self) -> StepCurve | None:
        """The curve that fits best; None after too few steps."""
        if self.steps < LEAST_STEPS:
            return None
        best, least = [0.0] * FEATURES, 0.0
        for count in range(1, FEATURES + 1):
            for chosen in combinations(range(FEATURES), count):
                parts = self._solve(chosen)
                if parts is not None and min(parts) >= 0.0:
                    # The squared error, but for what is the same for all subsets, is -parts . vector.
                    error = -sum(
                        part * self._vector[index] for part, index in zip(parts, chosen, strict=True)
                    )
                    if error < least:
                        best, least = [0.0] * FEATURES, error
                        for part, index in zip(parts, chosen, strict=True):
                            best[index] = part
        return StepCurve(*best)

    def _solve(self, chosen: Sequence[int]) -> list[float] | None:
        """The least squares over some features, by Gauss-Jordan; None when they cannot be told apart."""
        rows = [[*(self._matrix[row][column] for column in chosen), self._vector[row]] for row in chosen]
        for pivot, feature in enumerate(chosen):
            size = rows[pivot][pivot]
            if size <= DEGENERATE * self._matrix[feature][feature]:
                return None
            rows[pivot] = [value / size for value in rows[pivot]]
            for index, row in enumerate(rows):
                if index != pivot and row[pivot]:
                    factor = row[pivot]
                    rows[index] = [value - factor * own for value, own in zip(row, rows[pivot], strict=True)]
        return [row[-1] for row in rows]
