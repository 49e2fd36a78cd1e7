"""The socket to one scheduler, as far as tables and HTTP tests do not show it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import zmq

from sfllm import wire
from sfllm.messages import GATEWAY_TO_SCHEDULER, GatewayHello, GatewayWelcome, Message
from sfllm.sockets import RouterLink
from sfllm_gateway.link import SchedulerLink
from sfllm_gateway.stream import Outgoing
from sfllm_gateway.streams import CLEAR_OUTBOX, ClearOutbox

IDENTITY = b"g-test"


def hello(number: int) -> list[Outgoing | ClearOutbox]:
    return [CLEAR_OUTBOX, Outgoing(GatewayHello(number))]


async def test_a_scheduler_that_comes_late_hears_one_hello_and_not_all_that_were_said_meanwhile(
    tmp_path: Path,
) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = f"ipc://{tmp_path}/scheduler"
    taken: list[Message] = []
    came = asyncio.Event()
    link = SchedulerLink(
        context, address, IDENTITY, lambda message, _arrays: taken.append(message), came.set, watched=True
    )
    for second in range(10):
        link.send(hello(second))
        assert link.seconds_lost(float(second)) == 0.0
    router = RouterLink(context, address)
    decode = wire.decoder(GATEWAY_TO_SCHEDULER)
    heard: list[Message] = []

    async def hear(count: int) -> None:
        async with asyncio.timeout(20):
            while len(heard) < count:
                received = router.receive()
                if received is None:
                    await asyncio.sleep(0.01)
                    continue
                heard.append(decode(received[1]).message)

    await hear(1)
    router.send(IDENTITY, wire.encode(GatewayWelcome(5, 1.0, 2.0)))
    async with asyncio.timeout(20):
        while not taken:
            came.clear()
            await came.wait()
    link.seconds_lost(10.0)
    for number in (10, 11):  # now there is somebody to hear them
        link.send(hello(number))
    await hear(3)
    assert heard == [GatewayHello(number) for number in (0, 10, 11)]
    link.close()
    router.close()
    context.term()
