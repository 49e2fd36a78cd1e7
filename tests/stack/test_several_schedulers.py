"""Two schedulers, two gateways, three workers: a scheduler goes and comes back, and no client notices."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
from chaos.ask import Delivery, ask, ask_until_accepted
from chaos.fleet import Fleet, eventually
from chaos.http_client import get
from chaos.judge import judge
from chaos.layout import FleetOptions
from chaos.service import Service
from short_streams import completion

from sfllm.rendezvous import ranked

SECONDS = 120.0
CLIENTS = 6

OPTIONS = FleetOptions(
    workers=3,
    gateways=2,
    schedulers=2,
    relays=False,
    beat_seconds=0.2,
    lease_seconds=0.8,
    worker={"mock_tokens_per_second": 60.0},
)
TEMPLATES = (
    completion("short", prompt="What is it?", seed=1, max_tokens=20),
    completion("long", seed=2, max_tokens=150),
    completion("two choices", n=2, seed=3, max_tokens=60),
    completion("same beginning", prompt="All of these begin alike. " * 20, seed=4, max_tokens=60, logprobs=1),
    completion("not streamed", stream=False, stream_options=None, seed=5, max_tokens=40),
)


def wanted_spread(fleet: Fleet) -> list[int]:
    """How many workers should belong to each scheduler, by their ids and the addresses they were told."""
    found: Counter[int] = Counter()
    for worker in fleet.of_kind("worker"):
        [flag] = [part for part in worker.spec.command if part.startswith("--worker-address=")]
        log = (fleet.logs / f"{worker.name}.log").read_text()
        worker_id = re.findall(r"worker_id=.*?(w-[0-9a-f]{16})", log)[-1]
        found[ranked(worker_id, flag.partition("=")[2].split(","))[0]] += 1
    return [found[index] for index in range(OPTIONS.schedulers)]


async def spread(fleet: Fleet) -> list[int]:
    """How many workers each scheduler counts on, -1 for one that does not answer."""
    counts = [await fleet.value(each, "workers", state="serving") for each in fleet.of_kind("scheduler")]
    return [-1 if count is None else int(count) for count in counts]


async def wait_spread(fleet: Fleet, wanted: list[int]) -> None:
    async def is_so() -> bool:
        return await spread(fleet) == wanted

    assert await eventually(is_so, SECONDS), (
        f"{await spread(fleet)} instead of {wanted}; logs in {fleet.logs}"
    )


class Clients:
    """They ask without a pause, at both gateways, and compare every answer with the calm one."""

    def __init__(self, fleet: Fleet, calm: list[Delivery]) -> None:
        self._fleet = fleet
        self._calm = calm
        self._stopped = False
        self.answers = 0
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(CLIENTS)]

    async def _ask(self, number: int) -> None:
        addresses = itertools.cycle(self._fleet.urls.values())
        for expected in itertools.islice(itertools.cycle(self._calm), number, None):
            if self._stopped:
                return
            got = await ask(next(addresses), expected.template)
            assert (got.ended, got.error) == ("complete", ""), got
            assert judge(expected, got) is None, got.template.name
            self.answers += 1

    async def stop(self) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)

    async def some_more(self, answers: int) -> None:
        """Until so many further answers have come, or one was wrong."""
        goal = self.answers + answers

        async def is_reached() -> bool:
            return self.answers >= goal or any(task.done() for task in self._tasks)

        assert await eventually(is_reached, SECONDS)
        for task in self._tasks:
            if task.done():
                task.result()


async def ready(fleet: Fleet) -> set[int]:
    return {(await get(address, "/ready"))[0] for address in fleet.urls.values()}


async def migrations(fleet: Fleet) -> float:
    found = [await fleet.value(each, "request_migrations_total") for each in fleet.of_kind("gateway")]
    return sum(value or 0.0 for value in found)


@pytest.mark.timeout(300)
async def test_no_token_is_lost_while_one_of_two_schedulers_hangs_dies_and_comes_back(tmp_path: Path) -> None:
    async with Fleet(OPTIONS, tmp_path / "fleet") as fleet:
        wanted = wanted_spread(fleet)
        await wait_spread(fleet, wanted)
        calm = [await ask_until_accepted(fleet.urls["gateway-0"], template) for template in TEMPLATES]
        assert {delivery.ended for delivery in calm} == {"complete"}
        lost_index = wanted.index(max(wanted))
        lost, other = fleet.of_kind("scheduler")[lost_index], fleet.of_kind("scheduler")[1 - lost_index]
        clients = Clients(fleet, calm)
        await clients.some_more(2 * CLIENTS)

        await hang_until_all_workers_are_at(fleet, lost, other)
        assert await ready(fleet) == {200}
        await clients.some_more(2 * CLIENTS)
        assert await migrations(fleet) > 0

        for killed in (lost, other):
            lives = killed.lives
            assert killed.kill()
            assert await killed.ended(lives, 10)
            await clients.some_more(2 * CLIENTS)
            await wait_spread(fleet, wanted)
        await clients.some_more(2 * CLIENTS)
        await clients.stop()
        assert await fleet.leaks() == {}
        assert set((await fleet.stop()).values()) == {0}


async def hang_until_all_workers_are_at(fleet: Fleet, lost: Service, other: Service) -> None:
    """Stop a scheduler, as a machine does that swaps; kill it only when nobody counts on it any more."""
    assert lost.pause()
    await fleet.wait_value(other, "workers", lambda count: count == OPTIONS.workers, state="serving")
