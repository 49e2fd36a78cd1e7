"""A token message: many requests' new tokens in three flat arrays.

The first has the handle of each row (uint64). The second (uint32) begins with five numbers for each row:
attempt, choice, start index, count and width; a row says that tokens `start .. start + count` of
that choice are these ids. Then follow, of all rows one after another, the token ids, and, `width`
entries a token, the ids whose log probabilities were asked for: the chosen token first, then the
likeliest ones; the third array (float32) has their values. `width` 0 reports none. Flat arrays keep one
message a step cheap: a struct per token would cost more than the token, and every array costs both sides.
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
    """New tokens of one choice. `logprobs` view the message's memory."""

    handle: int
    attempt: int
    choice: int
    start: int
    ids: Sequence[int]
    logprobs: Logprobs = NO_LOGPROBS


ROW_NUMBERS = 5


class TokenBatch:
    """Collects rows and gives the arrays to send."""

    def __init__(self) -> None:
        self._handles = array("Q")
        self._numbers = array("I")
        self._ids = array("I")
        self._top_ids = array("I")
        self._logprobs = array("f")

    def __len__(self) -> int:
        return len(self._handles)

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
        self._handles.append(handle)
        self._numbers.extend((attempt, choice, start, len(ids), logprobs.width))
        self._ids.extend(ids)
        if logprobs.width:
            self._top_ids.extend(logprobs.ids)
            self._logprobs.extend(logprobs.values)

    def arrays(self) -> tuple[Array, ...]:
        """The three arrays, in wire order."""
        integers = self._numbers + self._ids + self._top_ids
        return memoryview(self._handles), memoryview(integers), memoryview(self._logprobs)


def check_arrays(arrays: Sequence[Array]) -> None:
    """Raise `WireError` unless the counts and widths of the rows add up to what came."""
    handles, integers, logprobs = arrays
    end = ROW_NUMBERS * len(handles)
    if end > len(integers):
        raise WireError(f"{len(handles)} rows of tokens need more than {len(integers)} numbers")
    counts, widths = integers[3:end:ROW_NUMBERS], integers[4:end:ROW_NUMBERS]
    tokens, candidates = sum(counts), sum(map(mul, counts, widths))
    if end + tokens + candidates != len(integers) or candidates != len(logprobs):
        raise WireError(
            f"{tokens} tokens and {candidates} candidates were announced, "
            f"but {len(integers) - end} ids and {len(logprobs)} values came"
        )


def rows(arrays: Sequence[Array]) -> Iterator[TokenRow]:
    """The rows of a received message. Raises `WireError` before the first row if they do not add up."""
    check_arrays(arrays)
    handles, integers, logprobs = arrays
    offset = end = ROW_NUMBERS * len(handles)
    candidates_offset = len(integers) - len(logprobs)
    value_offset = 0
    numbers = integers[:candidates_offset].tolist()  # parts of a list are cheaper than parts of a view
    for handle, number in zip(handles, range(0, end, ROW_NUMBERS), strict=True):
        attempt, choice, start, count, width = numbers[number : number + ROW_NUMBERS]
        candidates = NO_LOGPROBS
        if width:
            first, last = value_offset, value_offset + count * width
            ids = integers[candidates_offset + first : candidates_offset + last]
            candidates = Logprobs(width, ids, logprobs[first:last])
            value_offset = last
        yield TokenRow(handle, attempt, choice, start, numbers[offset : offset + count], candidates)
        offset += count
