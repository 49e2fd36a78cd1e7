"""Where one text is in its grammar, and which tokens may come next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

Masks = npt.NDArray[np.int64]
"""A row of bits for each text, lowest first: bit t is whether token t may come next."""

WORD_BITS = 64


class Constraint:
    """One text's place in a grammar. Owned by its sequence; forks of it get a copy."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Constraint:
        """The same place, to go on from independently."""
        return Constraint(self._matcher.deep_copy())

    def consume(self, tokens: Sequence[int]) -> bool:
        """Go on by tokens. False, for good, when the grammar does not allow them or became too complex."""
        return bool(self._matcher.consume_tokens(list(tokens)))

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end of the text can follow."""
        return bool(self._matcher.is_stopped())

    def write_mask(self, row: Masks) -> None:
        """Which tokens may come next, into a row of `mask_words` words; the end of text where it may end.

        A text that `consume` gave up has none.
        """
        if self._matcher.is_error():
            row.fill(0)
        else:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)


def mask_words(vocab_size: int) -> int:
    """How many words a row of masks has."""
    return -(-vocab_size // WORD_BITS)


def masks_of(constraints: Sequence[Constraint], vocab_size: int) -> Masks:
    """The masks of several texts, int64 `[num_texts, mask_words]`."""
    masks = np.zeros((len(constraints), mask_words(vocab_size)), dtype=np.int64)
    for constraint, row in zip(constraints, masks, strict=True):
        constraint.write_mask(row)
    return masks
