"""What a page of Prometheus metrics says, whatever prefix its names have."""

from __future__ import annotations

from typing import Literal, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

Role = Literal["gateway", "scheduler", "worker"]

_MARKS: tuple[tuple[str, Role], ...] = (
    ("gateway_schedulers_connected", "gateway"),
    ("num_requests_waiting_by_reason", "scheduler"),
    ("kv_cache_usage_perc", "worker"),
)
"""One metric that only this kind of process has, and has from its first moment."""


class Sample(NamedTuple):
    """One line of the page."""

    name: str
    labels: dict[str, str]
    value: float


class Samples(NamedTuple):
    """One page: which kind of process it is of, the prefix of its own names, its lines."""

    role: Role | None = None
    prefix: str = ""
    lines: tuple[Sample, ...] = ()

    def find(self, name: str, **labels: str) -> list[Sample]:
        """The lines of this metric that have these labels; `process_...` has no prefix."""
        full = name if name.startswith("process_") else self.prefix + name
        return [line for line in self.lines if line.name == full and labels.items() <= line.labels.items()]

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of such lines; None without any."""
        found = self.find(name, **labels)
        return sum(line.value for line in found) if found else None


def read_samples(page: str) -> Samples:
    """The page as it can be asked; without a role if it is not of a process of sfllm. Raises ValueError."""
    lines = tuple(
        Sample(sample.name, dict(sample.labels), sample.value)
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    )
    for mark, role in _MARKS:
        for line in lines:
            if line.name.endswith(mark):
                return Samples(role, line.name.removesuffix(mark), lines)
    return Samples(lines=lines)
