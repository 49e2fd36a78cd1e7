"""Steps that keep a target for the time between tokens, as `sfllm_worker.engine.batch_sizing` makes them."""

from __future__ import annotations

from sfllm.step_curve import StepCurve

LEAST_PREFILL_TOKENS = 32
TOLERANCE = 0.125


class Sizing:
    """Sequences that may run together, and prompt tokens beside decodes. Without a target all that fit."""

    def __init__(self, target_seconds: float | None, most_sequences: int) -> None:
        self.sequences = most_sequences
        self._target = target_seconds
        self._most = most_sequences

    def follow(self, curve: StepCurve, slowness: float, mean_context: float) -> None:
        """Steps take so many times the curve, and sequences are about so long."""
        if self._target is None:
            return
        each = curve.per_decode_row + curve.per_context_token * mean_context
        left = self._target / slowness - curve.base_seconds
        fitting = max(1, _fitting(left, each, self._most))
        if abs(fitting - self.sequences) > TOLERANCE * self.sequences or fitting == self._most:
            self.sequences = fitting

    def prefill_tokens(
        self, curve: StepCurve, slowness: float, most: int, rows: int, context_tokens: int
    ) -> int:
        """How many prompt tokens may be in a step beside so many decodes: `most` if there are none."""
        if not rows or self._target is None:
            return most
        left = self._target / slowness - curve.seconds(0, rows, context_tokens)
        return max(_fitting(left, curve.per_prefill_token, most), min(most, LEAST_PREFILL_TOKENS))


def _fitting(seconds: float, each: float, most: int) -> int:
    seconds = max(seconds, 0.0)
    return most if each * most <= seconds else int(seconds / each)
