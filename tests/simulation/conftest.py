"""What the simulation's tests share."""

from __future__ import annotations

import pytest
from sfllm_simulation.report import quiet_logs


@pytest.fixture(autouse=True)
def no_logs() -> None:
    quiet_logs()
