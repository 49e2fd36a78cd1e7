"""How large steps may be so that tokens keep coming in time, by what steps were measured to take.

Two numbers follow from the curve of a worker's steps (`sfllm.step_curve`) and a target for the time between
tokens: how many sequences may decode together, and how many prompt tokens may join a step of decodes.
"""

from __future__ import annotations

from sfllm.step_curve import StepCurve

LEAST_PREFILL_TOKENS = 32
"""A step takes in so many prompt tokens whatever the target, so that prefill always gets on."""

TOLERANCE = 0.125
"""The number of sequences stays while it is right within this share: measurements always differ a little."""


class BatchSizing:
    """The sizes that keep a step within `target_seconds`. Until steps were measured nothing is held back.

    `curve` is what steps take, None until that is known.
    Invariant: 1 <= `sequences` <= the most that the engine takes.
    """

    def __init__(self, target_seconds: float, most_sequences: int) -> None:
        self.sequences = most_sequences
        self.curve: StepCurve | None = None
        self._target = target_seconds
        self._most = most_sequences

    def follow(self, curve: StepCurve, mean_context: float) -> None:
        """Steps take this now, and sequences are about so long."""
        self.curve = curve
        each = curve.per_decode_row + curve.per_context_token * mean_context
        fitting = max(1, _fitting(self._target - curve.base_seconds, each, self._most))
        if abs(fitting - self.sequences) > TOLERANCE * self.sequences or fitting == self._most:
            self.sequences = fitting

    def prefill_tokens(self, most: int, rows: int, context_tokens: int) -> int:
        """How many prompt tokens may be in a step beside so many decodes: `most` if there are none."""
        curve = self.curve
        if not rows or curve is None:
            return most
        left = self._target - curve.seconds(0, rows, context_tokens)
        return max(_fitting(left, curve.per_prefill_token, most), min(most, LEAST_PREFILL_TOKENS))


def _fitting(seconds: float, each: float, most: int) -> int:
    """How many fit if each takes so long: 0 to `most`, which is also how many if they take no time."""
    seconds = max(seconds, 0.0)
    return most if each * most <= seconds else int(seconds / each)
