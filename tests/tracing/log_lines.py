"""What the services of a stack log about a request."""

from __future__ import annotations

import json
import time
from typing import Any

from running_stack import RunningStack

WAIT_SECONDS = 30
OF_EVERY_REQUEST = {
    *(("gateway", "request accepted"), ("gateway", "request ended")),
    *(("scheduler", "admitted"), ("scheduler", "finished")),
    ("worker", "accepted"),
}
"""Service and event of lines that there are about any request, with `--log-level=debug`."""


def logged(stack: RunningStack, request_id: str, events: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """The log lines about a request, as soon as these events of these services are among them."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        found = [json.loads(line) for line in stack.log_lines() if line.startswith("{")]
        lines = [line for line in found if line.get("request_id") == request_id]
        if events <= {(line["service"], line["event"]) for line in lines}:
            return lines
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)
