"""The columns of a token message: many requests' new tokens in six flat arrays.

Columns, one entry a row: handle (uint64), attempt, choice, start index, count (uint32);
then the token ids of all rows one after another (uint32). A row says: tokens
`start .. start + count` of that choice are these ids. Columns keep one message a step
cheap: a struct per token would cost more than the token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sfllm.wire import Array, WireError


class TokenRow(NamedTuple):
    """New tokens of one choice. `ids` views the message's memory."""

    handle: int
    attempt: int
    choice: int
    start: int
    ids: Array


class TokenBatch:
    """Collects rows and gives the arrays to send."""

    def __init__(self) -> None:
        self._columns = (array("Q"), array("I"), array("I"), array("I"), array("I"), array("I"))

    def __len__(self) -> int:
        return len(self._columns[0])

    def append(self, handle: int, attempt: int, choice: int, start: int, ids: Sequence[int]) -> None:
        """Add tokens `start ..` of a choice."""
        handles, attempts, choices, starts, counts, all_ids = self._columns
        handles.append(handle)
        attempts.append(attempt)
        choices.append(choice)
        starts.append(start)
        counts.append(len(ids))
        all_ids.extend(ids)

    def arrays(self) -> tuple[Array, ...]:
        """The six columns, in wire order."""
        return tuple(memoryview(column) for column in self._columns)


def check_columns(arrays: Sequence[Array]) -> None:
    """Raise `WireError` unless the columns agree in length and the counts add up to the ids."""
    handles, attempts, choices, starts, counts, ids = arrays
    if not len(handles) == len(attempts) == len(choices) == len(starts) == len(counts):
        raise WireError("token columns differ in length")
    if sum(counts) != len(ids):
        raise WireError(f"token counts add up to {sum(counts)}, but {len(ids)} ids came")


def rows(arrays: Sequence[Array]) -> Iterator[TokenRow]:
    """The rows of a received message. Raises `WireError` before the first row if columns disagree."""
    check_columns(arrays)
    handles, attempts, choices, starts, counts, ids = arrays
    offset = 0
    for handle, attempt, choice, start, count in zip(handles, attempts, choices, starts, counts, strict=True):
        yield TokenRow(handle, attempt, choice, start, ids[offset : offset + count])
        offset += count
