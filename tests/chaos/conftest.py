from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from chaos.fleet import Fleet
from short_streams import BEAT_SECONDS, LEASE_SECONDS, MakeFleet


@pytest.fixture
def make_fleet(tmp_path: Path) -> MakeFleet:
    """A fleet of mock workers with short leases; `async with` runs it."""
    numbers = itertools.count()
    return lambda options: Fleet(
        options._replace(beat_seconds=BEAT_SECONDS, lease_seconds=LEASE_SECONDS),
        tmp_path / f"fleet-{next(numbers)}",
    )
