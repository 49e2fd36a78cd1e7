"""The header `traceparent` of W3C Trace Context, by which a request finds its trace from process to process.

https://www.w3.org/TR/trace-context/#traceparent-header
"""

from __future__ import annotations

import re
from typing import NamedTuple

_FORM = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.{0,256})?"
)


class TraceParent(NamedTuple):
    """A trace, the span in it that comes above what comes next, and whether the trace is recorded."""

    trace_id: int
    span_id: int
    sampled: bool

    def __str__(self) -> str:
        """As the header's value."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.sampled:02x}"


def parse(value: str) -> TraceParent | None:
    """What a header says, None if it is not in the form that the standard asks for.

    Versions later than the present one may have more behind the flags.
    """
    match = _FORM.fullmatch(value)
    if match is None or (match[1] == "00" and match[5]):
        return None
    return TraceParent(int(match[2], 16), int(match[3], 16), bool(int(match[4], 16) & 1))


def log_fields(request_id: str, traceparent: str) -> dict[str, str]:
    """What log lines about a request carry: its id and, if it is traced, that of its trace."""
    parent = parse(traceparent) if traceparent else None
    if parent is None:
        return {"request_id": request_id}
    return {"request_id": request_id, "trace_id": f"{parent.trace_id:032x}"}
