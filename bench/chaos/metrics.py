"""Reading the metrics that a service shows."""

from __future__ import annotations

import re

from chaos.http_client import Address, get

_SAMPLE = re.compile(r"([\w:]+)(?:\{(.*)\})? (\S+)")


def total(text: str, name: str, **labels: str) -> float:
    """The sum over the samples of a metric that have these labels; 0 when there are none."""
    found = 0.0
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line)
        if match and match[1] == name and all(f'{k}="{v}"' in (match[2] or "") for k, v in labels.items()):
            found += float(match[3])
    return found


async def read(address: Address) -> str:
    """The metrics page of a service. Raises OSError or TimeoutError."""
    return (await get(address, "/metrics"))[1].decode()
