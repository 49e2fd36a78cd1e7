"""The columns of a token message: many requests' new tokens in nine flat arrays.

Six columns with one entry a row: handle (uint64), attempt, choice, start index, count and
width (uint32). A row says: tokens `start .. start + count` of that choice are these ids.
Then, of all rows one after another: the token ids (uint32), and, `width` entries a token, the
ids and log probabilities (uint32, float32) that were asked for: the chosen token first, then
the likeliest ones; `width` 0 reports none. Columns keep one message a step cheap: a struct per
token would cost more than the token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from operator import mul
from typing import NamedTuple

from sfllm.wire import Array, WireError


class Logprobs(NamedTuple):
    """`width` candidates for each of some tokens: the token itself, then the likeliest ones.

    `ids` and `values` are flat, `width` entries a token.
    """

    width: int
    ids: Sequence[int]
    values: Sequence[float]


NO_LOGPROBS = Logprobs(0, (), ())


class TokenRow(NamedTuple):
    """New tokens of one choice. `ids` and `logprobs` view the message's memory."""

    handle: int
    attempt: int
    choice: int
    start: int
    ids: Array
    logprobs: Logprobs = NO_LOGPROBS


class TokenBatch:
    """Collects rows and gives the arrays to send."""

    def __init__(self) -> None:
        self._columns = tuple(array(code) for code in "QIIIII")
        self._ids = array("I")
        self._top_ids = array("I")
        self._logprobs = array("f")

    def __len__(self) -> int:
        return len(self._columns[0])

    def append(
        self,
        handle: int,
        attempt: int,
        choice: int,
        start: int,
        ids: Sequence[int],
        logprobs: Logprobs = NO_LOGPROBS,
    ) -> None:
        """Add tokens `start ..` of a choice."""
        entry = (handle, attempt, choice, start, len(ids), logprobs.width)
        for column, value in zip(self._columns, entry, strict=True):
            column.append(value)
        self._ids.extend(ids)
        self._top_ids.extend(logprobs.ids)
        self._logprobs.extend(logprobs.values)

    def arrays(self) -> tuple[Array, ...]:
        """The columns, in wire order."""
        integers = (*self._columns, self._ids, self._top_ids)
        return (*(memoryview(column) for column in integers), memoryview(self._logprobs))


def check_columns(arrays: Sequence[Array]) -> None:
    """Raise `WireError` unless the columns agree in length and the counts add up to the ids."""
    handles, attempts, choices, starts, counts, widths, ids, top_ids, logprobs = arrays
    if not len(handles) == len(attempts) == len(choices) == len(starts) == len(counts) == len(widths):
        raise WireError("token columns differ in length")
    if sum(counts) != len(ids):
        raise WireError(f"token counts add up to {sum(counts)}, but {len(ids)} ids came")
    candidates = sum(map(mul, counts, widths))
    if not candidates == len(top_ids) == len(logprobs):
        raise WireError(f"{candidates} candidates were announced, but {len(top_ids)} came")


def rows(arrays: Sequence[Array]) -> Iterator[TokenRow]:
    """The rows of a received message. Raises `WireError` before the first row if columns disagree."""
    check_columns(arrays)
    ids, top_ids, logprobs = arrays[6:]
    offset = top_offset = 0
    for handle, attempt, choice, start, count, width in zip(*arrays[:6], strict=True):
        candidates = NO_LOGPROBS
        if width:
            end = top_offset + count * width
            candidates = Logprobs(width, top_ids[top_offset:end], logprobs[top_offset:end])
            top_offset = end
        yield TokenRow(handle, attempt, choice, start, ids[offset : offset + count], candidates)
        offset += count
