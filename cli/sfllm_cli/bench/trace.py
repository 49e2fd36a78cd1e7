"""Traces: when requests came and how long they were. Pure: text and a random source in, entries out."""

from __future__ import annotations

import csv
import datetime
import io
import random
from collections.abc import Sequence
from typing import NamedTuple

# Names of the columns: ours first, then those of the traces that Azure published in 2023.
TIME_NAMES = ("time", "timestamp")
PROMPT_NAMES = ("prompt_tokens", "contexttokens")
OUTPUT_NAMES = ("output_tokens", "generatedtokens")

# The made-up trace: log-normal lengths with about the spread of published chat traffic, shorter, so
# that models with a context of 4,096 tokens take it.
CHAT_PROMPT = (200, 1.0, 8, 2048)
CHAT_OUTPUT = (120, 0.8, 4, 512)
CHAT_REQUESTS_PER_SECOND = 1.0


class TraceError(ValueError):
    """A file is no trace; the text says which line and what was expected there."""


class Entry(NamedTuple):
    """One request of a trace; `at` is in seconds after the first."""

    at: float
    prompt_tokens: int
    output_tokens: int


class _Columns(NamedTuple):
    time: int
    prompt: int
    output: int


def parse_trace(text: str) -> list[Entry]:
    """The entries of a CSV file in order of time, the first at 0. Raises `TraceError`.

    The first line names the columns, in any order and case, others may stand between them:
    `time` in seconds or as an ISO 8601 date and time, `prompt_tokens` and `output_tokens`; or
    `TIMESTAMP`, `ContextTokens` and `GeneratedTokens`.
    """
    rows = csv.reader(io.StringIO(text.removeprefix("\ufeff")))
    try:
        lines = [(rows.line_num, row) for row in rows if row]
    except csv.Error as error:
        raise TraceError(f"line {rows.line_num}: {error}") from error
    if not lines:
        raise TraceError("the file is empty; its first line must be: time,prompt_tokens,output_tokens")
    columns = _columns(lines[0][1])
    entries = [_entry(line, row, columns) for line, row in lines[1:]]
    if not entries:
        raise TraceError("there is no request after the first line")
    entries.sort()
    return [entry._replace(at=entry.at - entries[0].at) for entry in entries]


def chat_trace(count: int, source: random.Random) -> list[Entry]:
    """A made-up trace of `count` requests like those of a chat service, one a second on average."""
    at, entries = 0.0, []
    for _ in range(count):
        entries.append(Entry(at, _length(source, *CHAT_PROMPT), _length(source, *CHAT_OUTPUT)))
        at += source.expovariate(CHAT_REQUESTS_PER_SECOND)
    return entries


def poisson_times(rate: float, count: int, source: random.Random) -> list[float]:
    """Arrival times of a Poisson process of `rate` a second, the first at 0; all 0 for an infinite rate."""
    at, times = 0.0, []
    for _ in range(count):
        times.append(at)
        at += source.expovariate(rate)
    return times


def rescaled(times: Sequence[float], rate: float) -> list[float]:
    """Ascending `times` that start at 0, stretched so that they come at `rate` a second on average.

    Times that are all the same cannot be stretched and stay.
    """
    if not times or times[-1] == 0:
        return list(times)
    seconds = (len(times) - 1) / rate
    return [time / times[-1] * seconds for time in times]


def _length(source: random.Random, median: int, sigma: float, low: int, high: int) -> int:
    return min(high, max(low, round(median * source.lognormvariate(0, sigma))))


def _columns(header: Sequence[str]) -> _Columns:
    names = [name.strip().lower() for name in header]

    def find(wanted: tuple[str, ...]) -> int:
        for name in wanted:
            if name in names:
                return names.index(name)
        raise TraceError(
            f"line 1: no column {wanted[0]!r} among {', '.join(header)}; expected time, prompt_tokens "
            "and output_tokens, or TIMESTAMP, ContextTokens and GeneratedTokens"
        )

    return _Columns(find(TIME_NAMES), find(PROMPT_NAMES), find(OUTPUT_NAMES))


def _entry(line: int, row: Sequence[str], columns: _Columns) -> Entry:
    if len(row) <= max(columns):
        raise TraceError(f"line {line}: {len(row)} values, expected at least {max(columns) + 1}")
    return Entry(
        _seconds(line, row[columns.time].strip()),
        _tokens(line, row[columns.prompt].strip()),
        _tokens(line, row[columns.output].strip()),
    )


def _tokens(line: int, text: str) -> int:
    # Longer numbers are no lengths, and Python refuses to convert very long ones.
    if not (text.isascii() and text.isdigit() and len(text) <= 9) or int(text) == 0:
        raise TraceError(f"line {line}: {text[:40]!r} is no number of tokens of at least 1")
    return int(text)


def _seconds(line: int, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = datetime.datetime.fromisoformat(text)
        except ValueError as error:
            raise TraceError(
                f"line {line}: {text[:40]!r} is no time: neither seconds nor such as 2023-11-16 18:15:46.68"
            ) from error
        # Only differences count, so a time without a zone may be read as any.
        seconds = moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()
    if not abs(seconds) < 1e12:
        raise TraceError(f"line {line}: {text[:40]!r} is no time of a trace")
    return seconds
