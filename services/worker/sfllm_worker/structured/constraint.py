"""Where one text is in its grammar, and which tokens may come next."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

Masks = npt.NDArray[np.int64]
"""A row of bits for each text, lowest first: bit t is whether token t may come next."""

WORD_BITS = 64

FEW = 16
"""So many masks are computed one after the other: waking threads takes as long."""


class Constraint:
    """One text's place in a grammar. Owned by its sequence; forks of it get a copy."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def copy(self) -> Constraint:
        """The same place, to go on from independently."""
        return Constraint(self.matcher.deep_copy())

    def consume(self, tokens: Sequence[int]) -> bool:
        """Go on by tokens. False, for good, when the grammar does not allow them or became too complex."""
        return bool(self.matcher.consume_tokens(list(tokens)))

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end of the text can follow."""
        return bool(self.matcher.is_stopped())

    @property
    def problem(self) -> str:
        """Why it cannot be followed any further, empty while it can: mostly, that it became too complex.

        Its masks allow nothing but the end of text then.
        """
        return str(self.matcher.get_error()).removesuffix("<non-verbose/>").strip()


def mask_words(vocab_size: int) -> int:
    """How many words a row of masks has."""
    return -(-vocab_size // WORD_BITS)


def masks_of(constraints: Sequence[Constraint], vocab_size: int) -> Masks:
    """The masks of different texts, int64 `[num_texts, mask_words]`; the end of text where it may end."""
    masks = np.zeros((len(constraints), mask_words(vocab_size)), dtype=np.int64)
    if len(constraints) > FEW:
        places = [(constraint.matcher, index) for index, constraint in enumerate(constraints)]
        _threads().unsafe_compute_mask_ptr(places, masks.ctypes.data, masks[0].nbytes, len(masks))
        return masks
    for constraint, row in zip(constraints, masks, strict=True):
        constraint.matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    return masks


@functools.cache
def _threads() -> LLExecutor:
    return LLExecutor()
