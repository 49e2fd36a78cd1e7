from __future__ import annotations

import pytest

from sfllm.traceparent import TraceParent, log_fields, parse

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize("flags", ["00", "01", "03"])
def test_a_header_is_read_and_written(flags: str) -> None:
    parent = parse(f"00-{TRACE}-{SPAN}-{flags}")
    assert parent == TraceParent(int(TRACE, 16), int(SPAN, 16), flags != "00")
    assert str(parent) == f"00-{TRACE}-{SPAN}-{'00' if flags == '00' else '01'}"


def test_a_later_version_may_say_more() -> None:
    assert parse(f"01-{TRACE}-{SPAN}-01-what-the-future-brings") == parse(f"00-{TRACE}-{SPAN}-01")


@pytest.mark.parametrize(
    "value",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"01-{TRACE}-{SPAN}-01more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_what_the_standard_forbids_is_no_header(value: str) -> None:
    assert parse(value) is None


def test_log_lines_name_the_trace_only_of_traced_requests() -> None:
    assert log_fields("r", f"00-{TRACE}-{SPAN}-01") == {"request_id": "r", "trace_id": TRACE}
    assert log_fields("r", "") == {"request_id": "r"}
    assert log_fields("r", "nonsense") == {"request_id": "r"}
