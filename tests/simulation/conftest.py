"""What the simulation's tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sfllm_simulation.report import quiet_logs


@pytest.fixture(autouse=True)
def no_logs() -> None:
    quiet_logs()
