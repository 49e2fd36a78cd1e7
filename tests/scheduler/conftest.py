"""Fixtures of the scheduler's tests."""

from __future__ import annotations

import pytest
from core_driver import Driver


@pytest.fixture
def driver() -> Driver:
    """A core with one gateway and no worker."""
    driver = Driver()
    driver.gateway()
    return driver
