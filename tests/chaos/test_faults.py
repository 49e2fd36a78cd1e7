"""What a fault may touch and what it may not: gateways, poison, steps that never end, clients that leave."""

from __future__ import annotations

import asyncio
import json
import random

import pytest
from chaos.ask import Delivery, ask, ask_until_accepted
from chaos.http_client import Address
from chaos.judge import judge
from chaos.layout import FleetOptions
from running_stack import RunningStack
from short_streams import MakeFleet, completion

POISON_TOKEN = 255
POISON = completion("poison", prompt=[POISON_TOKEN], max_tokens=4)
INNOCENTS = 40
LONG = 10**4


async def test_a_killed_gateway_takes_only_its_own_connections_along(make_fleet: MakeFleet) -> None:
    options = FleetOptions(
        gateways=2, worker={"mock_tokens_per_second": 30.0, "max_context_length": 2 * LONG}
    )
    async with make_fleet(options) as fleet:
        doomed, spared = fleet.of_kind("gateway")
        template = completion("spared", max_tokens=60)
        calm = await ask_until_accepted(fleet.urls[spared.name], template)
        endless = [
            asyncio.create_task(ask(fleet.urls[doomed.name], completion("doomed", max_tokens=LONG)))
            for _ in range(5)
        ]
        others = [asyncio.create_task(ask(fleet.urls[spared.name], template)) for _ in range(5)]
        await fleet.wait_value(fleet.scheduler, "num_requests_running", lambda running: running == 10)
        assert doomed.kill()
        for delivery in await asyncio.gather(*endless):
            assert delivery.ended == "broken"
        for delivery in await asyncio.gather(*others):
            assert delivery.ended == "complete"
            assert judge(calm, delivery) is None
        # The endless ones would run for minutes.
        await fleet.wait_value(fleet.scheduler, "num_requests_running", lambda running: running == 0, 30)
        await fleet.wait_ready()
        assert await fleet.leaks() == {}


async def innocents_survive(address: Address) -> None:
    """A poison request among innocents: it gets a 500 with its id, they get what they should."""
    template = completion("innocent", max_tokens=40, logprobs=1)
    calm = await ask_until_accepted(address, template)
    assert calm.ended == "complete"
    tasks = [asyncio.create_task(ask(address, template)) for _ in range(INNOCENTS)]
    tasks.insert(INNOCENTS // 2, asyncio.create_task(ask(address, POISON)))
    poison, *others = [await task for task in [tasks[INNOCENTS // 2], *tasks]]
    others.remove(poison)
    for delivery in others:
        assert (delivery.ended, delivery.error) == ("complete", "")
        assert judge(calm, delivery) is None
    assert is_told_of_its_crashes(poison), poison


def is_told_of_its_crashes(delivery: Delivery) -> bool:
    """A 500 that names the request, whether the stream had begun or not."""
    if delivery.status == 200:
        return delivery.error.startswith("engine_failure") and delivery.request_id in delivery.error
    error = json.loads(delivery.error)["error"]
    return delivery.status == 500 and delivery.request_id in error["message"]


@pytest.mark.parametrize("poison", ["crash", "fail"])
async def test_a_poison_request_is_found_among_three_workers(make_fleet: MakeFleet, poison: str) -> None:
    worker = {"mock_poison_token": POISON_TOKEN, "mock_poison": poison}
    async with make_fleet(FleetOptions(workers=3, worker=worker)) as fleet:
        await innocents_survive(fleet.urls["gateway-0"])
        await fleet.wait_ready()
        assert await fleet.leaks() == {}


async def test_a_poison_request_is_found_when_the_supervisor_restarts_the_only_worker() -> None:
    stack = RunningStack(
        "--mock", f"--mock-poison-token={POISON_TOKEN}", "--beat-seconds=0.2", "--lease-seconds=0.8"
    )
    try:
        await asyncio.to_thread(stack.wait_until_ready)
        await innocents_survive(Address("127.0.0.1", int(stack.url.rpartition(":")[2])))
    finally:
        code = await asyncio.to_thread(stack.stop)
    assert code == 0


async def test_a_step_that_never_ends_is_ended_and_others_go_on(make_fleet: MakeFleet) -> None:
    worker = {"mock_poison_token": POISON_TOKEN, "mock_poison": "stall", "step_timeout_seconds": 1.0}
    async with make_fleet(FleetOptions(workers=2, worker=worker)) as fleet:
        address = fleet.urls["gateway-0"]
        template = completion("other", max_tokens=60)
        calm = await ask_until_accepted(address, template)
        others = [asyncio.create_task(ask(address, template)) for _ in range(6)]
        assert is_told_of_its_crashes(await ask(address, POISON))
        for task in others:
            assert judge(calm, await task) is None
        await fleet.wait_ready()
        assert await fleet.leaks() == {}


async def test_a_thousand_clients_that_leave_anywhere_leave_nothing_behind(make_fleet: MakeFleet) -> None:
    rng = random.Random(3)
    # Little memory, so that requests wait, are preempted, and share prompts.
    worker = {"max_running_tokens": 2048, "max_batch_size": 16, "max_context_length": 512}
    room = asyncio.Semaphore(64)
    ended = {"left": 0, "complete": 0}

    async def leave(address: Address, number: int) -> None:
        template = completion(
            "left",
            prompt=[rng.randrange(200) for _ in range(rng.choice([1, 33, 200]))],
            max_tokens=rng.randrange(1, 60),
            n=rng.choice([1, 1, 2, 4]),
            stream=rng.random() < 0.6,
            stream_options=None,
            seed=number,
        )
        async with room:
            delivery = await ask(address, template, leave_after=rng.expovariate(4.0))
        assert delivery.ended in ended, delivery
        ended[delivery.ended] += 1

    async with make_fleet(FleetOptions(workers=2, worker=worker)) as fleet:
        address = fleet.urls["gateway-0"]
        tasks = [asyncio.create_task(leave(address, number)) for number in range(1000)]
        for worker_service in fleet.of_kind("worker"):  # so that some leave while they are being moved
            await fleet.wait_value(
                worker_service, "worker_sequences", lambda running: running > 0, state="running"
            )
            worker_service.kill()
        await asyncio.gather(*tasks)
        assert ended["left"] > 300, ended
        await fleet.wait_ready()
        assert await fleet.leaks() == {}
