"""Counts what clients got, and keeps a line about each delivery that is not as it should be."""

from __future__ import annotations

import dataclasses
from collections import Counter

from chaos.ask import Delivery
from chaos.judge import Fault

KEPT_LINES = 50


@dataclasses.dataclass
class Tally:
    """Deliveries by how they ended.

    `with_gateway` ended with the gateway that they were bound to, `left` because the client went away,
    `turned_away` before anything was accepted. The rest of what is not `complete` are failures.
    """

    complete: int = 0
    tokens: int = 0
    left: int = 0
    with_gateway: int = 0
    turned_away: int = 0
    near_ties: int = 0
    failures: Counter[str] = dataclasses.field(
        default_factory=lambda: Counter({"lost": 0, "doubled": 0, "wrong": 0, "errors": 0})
    )
    lines: list[str] = dataclasses.field(default_factory=list)
    longest_pause_seconds: float = 0.0
    longest_pause_request: str = ""

    def fail(self, kind: str, line: str) -> None:
        """A failure; `line` helps to find its cause."""
        self.failures[kind] += 1
        if len(self.lines) < KEPT_LINES:
            self.lines.append(f"{kind}: {line}")

    def take(self, delivery: Delivery, fault: Fault | None, gateway_died: bool) -> None:
        """One more delivery; `gateway_died` says whether its own gateway was killed meanwhile."""
        self.tokens += delivery.tokens
        about = f"{delivery.template.name}, request {delivery.request_id or '?'}"
        if fault is not None:
            self.fail(fault.kind, f"{about}: {fault.detail}")
        elif delivery.ended == "complete":
            self.complete += 1
            if delivery.longest_pause > self.longest_pause_seconds:
                self.longest_pause_seconds = delivery.longest_pause
                self.longest_pause_request = delivery.request_id
        elif delivery.ended == "left":
            self.left += 1
        elif delivery.ended == "turned away":
            self.turned_away += 1
        elif delivery.ended == "broken" and gateway_died:
            self.with_gateway += 1
        elif delivery.ended == "broken":
            self.fail("lost", f"{about}: {delivery.error} after {delivery.tokens} tokens")
        else:
            self.fail("errors", f"{about}: {delivery.status} {delivery.error}")

    @property
    def streams(self) -> int:
        """Requests that were accepted."""
        return self.complete + self.left + self.with_gateway + sum(self.failures.values())
