from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fake_scheduler import FakeScheduler, Script
from gateway_process import GatewayProcess


@pytest.fixture(scope="session")
def scheduler() -> Iterator[FakeScheduler]:
    fake = FakeScheduler()
    yield fake
    fake.close()


@pytest.fixture(scope="session")
def shared_gateway(scheduler: FakeScheduler) -> Iterator[GatewayProcess]:
    process = GatewayProcess(scheduler, "--max-body-bytes=65536", "--max-streams=8", "--max-attempts=4")
    process.wait_ready()
    yield process
    code, log = process.stop()
    assert code == 0, log
    assert "Traceback" not in log, log


@pytest.fixture
def gateway(shared_gateway: GatewayProcess, scheduler: FakeScheduler) -> GatewayProcess:
    """the shared gateway, with the scheduler's script as it is at first."""
    scheduler.script = Script()
    scheduler.seen.clear()
    scheduler.prompts.clear()
    return shared_gateway


@pytest.fixture
def own_scheduler() -> Iterator[FakeScheduler]:
    fake = FakeScheduler()
    yield fake
    fake.close()


@pytest.fixture
def start() -> Iterator[Callable[..., GatewayProcess]]:
    """Starts gateways that are stopped when the test ends."""
    started: list[GatewayProcess] = []

    def make(scheduler: FakeScheduler, *flags: str) -> GatewayProcess:
        started.append(GatewayProcess(scheduler, *flags))
        return started[-1]

    yield make
    for process in started:
        process.process.kill()
        process.process.wait()
