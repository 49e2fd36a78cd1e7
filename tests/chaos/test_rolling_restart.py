"""Every process is restarted in turn while clients ask, and no client notices."""

from __future__ import annotations

import asyncio

from chaos.ask import ask, ask_until_accepted
from chaos.judge import judge
from chaos.layout import FleetOptions
from short_streams import MakeFleet, completion

CLIENTS = 12


async def test_a_rolling_restart_under_load_loses_nothing(make_fleet: MakeFleet) -> None:
    options = FleetOptions(workers=2, gateways=2, shared_port=True, worker={"drain_seconds": 0.5})
    template = completion("rolling", max_tokens=30, n=2, logprobs=1)
    stopping = asyncio.Event()

    async with make_fleet(options) as fleet:
        address = fleet.urls["gateway-0"]
        calm = await ask_until_accepted(address, template)

        async def client() -> int:
            answers = 0
            while not stopping.is_set():
                delivery = await ask(address, template)
                assert (delivery.ended, delivery.error) == ("complete", ""), delivery
                assert judge(calm, delivery) is None
                answers += 1
            return answers

        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(client()) for _ in range(CLIENTS)]
            for service in fleet.services:
                assert service.terminate()
                assert await service.ended(0, 60), service.name
                assert service.ends[0].code == 0, service.name
                await fleet.wait_ready()
            stopping.set()
        assert all(task.result() > 0 for task in clients)
        assert await fleet.leaks() == {}
        assert set((await fleet.stop()).values()) == {0}
