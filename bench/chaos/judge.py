"""Compares what a client got with what the same request gave in calm. Pure: no sockets, no clocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from chaos.ask import Delivered, Delivery

Kind = Literal["lost", "doubled", "wrong"]

LONGEST_SLIP = 64
"""A repeat or a hole of more tokens than this counts as wrong tokens."""


class Fault(NamedTuple):
    """What is wrong with a delivery: tokens are missing, came twice, or are others."""

    kind: Kind
    detail: str


class Difference(NamedTuple):
    """The first token of a choice that is another than in calm."""

    choice: int
    position: int
    expected: int
    got: int


Excuse = Callable[[Difference, Delivery], bool]
"""Whether a different token is a near-tie of the real model, after which the rest may differ too."""


def judge(
    calm: Delivery, got: Delivery, logprob_tolerance: float = 0.0, excuse: Excuse | None = None
) -> Fault | None:
    """The fault of a delivery, None when it is what it should be.

    A delivery that ended "complete" must be all of the calm one, any other its beginning.
    """
    whole = got.ended == "complete"
    if whole and set(got.choices) != set(calm.choices):
        return Fault("lost", f"choices {sorted(got.choices)} instead of {sorted(calm.choices)}")
    for index, found in sorted(got.choices.items()):
        expected = calm.choices.get(index)
        if expected is None:
            return Fault("wrong", f"there is no choice {index}")
        position = _first_difference(expected.ids, found.ids)
        if position is not None and excuse is not None:
            difference = Difference(index, position, expected.ids[position], found.ids[position])
            if excuse(difference, got):
                continue
        fault = _tokens(expected.ids, found.ids, position, whole) or _rest(
            expected, found, whole, logprob_tolerance
        )
        if fault is not None:
            return Fault(fault.kind, f"choice {index}: {fault.detail}")
    if whole and got.usage_tokens != calm.usage_tokens and excuse is None:
        return Fault("wrong", f"usage says {got.usage_tokens} tokens instead of {calm.usage_tokens}")
    return None


def _first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Where both have a token and it is another."""
    pairs = enumerate(zip(expected, got, strict=False))
    return next((index for index, (wanted, found) in pairs if wanted != found), None)


def _tokens(expected: Sequence[int], got: Sequence[int], position: int | None, whole: bool) -> Fault | None:
    if position is not None:
        return _slip(expected, got, position)
    if len(got) > len(expected):
        return Fault("doubled", f"{len(got)} tokens instead of {len(expected)}")
    if whole and len(got) < len(expected):
        return Fault("lost", f"{len(got)} tokens instead of {len(expected)}")
    return None


def _slip(expected: Sequence[int], got: Sequence[int], position: int) -> Fault:
    """What kind of difference begins at `position`."""
    for size in range(1, LONGEST_SLIP):
        if _same(expected[position:], got[position + size :]):
            return Fault("doubled", f"{size} tokens too many at {position}")
        if _same(expected[position + size :], got[position:]):
            return Fault("lost", f"{size} tokens missing at {position}")
    return Fault("wrong", f"token {position} is {got[position]} instead of {expected[position]}")


def _same(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two sequences agree as far as both go, and that is far enough to be no accident."""
    size = min(len(one), len(other))
    return (size >= 2 or len(one) == len(other) > 0) and list(one[:size]) == list(other[:size])


def _rest(expected: Delivered, got: Delivered, whole: bool, logprob_tolerance: float) -> Fault | None:
    """What must be right besides the tokens."""
    if whole and got.text != expected.text:
        return Fault("wrong", f"the text is {got.text!r} instead of {expected.text!r}")
    if not expected.text.startswith(got.text):
        return Fault("wrong", f"the text {got.text!r} does not begin {expected.text!r}")
    if whole and got.finish_reason != expected.finish_reason:
        return Fault("wrong", f"it finished by {got.finish_reason} instead of {expected.finish_reason}")
    wanted = len(got.ids) if expected.logprobs else 0
    if len(got.logprobs) != wanted:
        return Fault("lost", f"{len(got.logprobs)} log probabilities instead of {wanted}")
    for index, (right, found) in enumerate(zip(expected.logprobs, got.logprobs, strict=False)):
        if abs(right - found) > logprob_tolerance:
            return Fault("wrong", f"log probability {index} is {found} instead of {right}")
    return None
