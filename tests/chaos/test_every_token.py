"""Each service is killed, stopped and restarted at every token of a short stream; nobody may notice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from chaos.fleet import Fleet, eventually
from chaos.layout import FleetOptions
from chaos.service import Service
from short_streams import LEASE_SECONDS, TOKENS, MakeFleet, disturbed, in_calm

# Slow enough that a fault comes between two tokens; a drain has no time to finish anything.
WORKER = {"mock_tokens_per_second": 25.0, "drain_seconds": 0.1}


async def kill(fleet: Fleet, service: Service) -> None:
    lives = service.lives
    assert service.kill()
    assert await service.ended(lives, 10)


async def stop_and_resume_late(fleet: Fleet, service: Service) -> None:
    assert service.pause()
    await asyncio.sleep(1.5 * LEASE_SECONDS)
    assert service.resume()


async def restart(fleet: Fleet, service: Service) -> None:
    lives = service.lives
    assert service.terminate()
    assert await service.ended(lives, 10)
    assert service.ends[-1].code == 0


async def busiest_worker(fleet: Fleet) -> Service:
    """The worker that runs most sequences now, of those that have started."""
    found: dict[float, Service] = {}

    async def one_has_started() -> bool:
        for worker in fleet.of_kind("worker"):
            running = await fleet.value(worker, "worker_sequences", state="running")
            if running is not None:
                found[running] = worker
        return bool(found)

    assert await eventually(one_has_started, 60)
    return found[max(found)]


Deed = Callable[[Fleet, Service], Awaitable[None]]


@pytest.mark.parametrize(
    ("deed", "workers"),
    [
        # Its streams wait for the next life of the only worker; in the other cases they move to another.
        pytest.param(kill, 1, id="killed"),
        pytest.param(stop_and_resume_late, 2, id="stopped and resumed late"),
        pytest.param(restart, 2, id="restarted"),
    ],
)
async def test_streams_outlive_worker_and_scheduler_at_every_token(
    make_fleet: MakeFleet, deed: Deed, workers: int
) -> None:
    options = FleetOptions(workers=workers, relays=False, worker=WORKER)
    # Both at once, because all of this is waiting.
    async with make_fleet(options) as one, make_fleet(options) as other, asyncio.TaskGroup() as group:

        async def lose_a_worker() -> None:
            await deed(one, await busiest_worker(one))

        group.create_task(check_every_token(one, lose_a_worker))
        group.create_task(check_every_token(other, lambda: deed(other, other.scheduler)))


async def check_every_token(fleet: Fleet, disturb: Callable[[], Awaitable[None]]) -> None:
    """Disturb the same streams at each of their tokens, and end with nothing left over."""
    address = fleet.urls["gateway-0"]
    calm = await in_calm(address)
    for index in range(TOKENS):
        await disturbed(address, calm, index, disturb)
    [gateway] = fleet.of_kind("gateway")
    moves = await fleet.value(gateway, "request_migrations_total")
    assert moves is not None
    assert moves >= TOKENS / 2, "hardly anything was disturbed"
    await fleet.wait_ready()
    assert await fleet.leaks() == {}
    assert set((await fleet.stop()).values()) == {0}
