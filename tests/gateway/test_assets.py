"""Pulling files from a scheduler, over real sockets."""

from __future__ import annotations

import asyncio
import select
import time
from pathlib import Path

import zmq

from sfllm import wire
from sfllm.asset_pull import asset_of, chunk_of
from sfllm.messages import ASSETS, AssetGet
from sfllm.sockets import RouterLink
from sfllm_gateway.assets import AssetLink

CONTENT = b"x" * 1000
PATIENCE_SECONDS = 20.0
WATCHED_SECONDS = 1.0


async def test_a_socket_that_nobody_reads_keeps_no_core_busy(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = f"ipc://{tmp_path}/assets"
    router = RouterLink(context, address)
    link = AssetLink(context, address, b"g-1")
    asset = asset_of("tokenizer.json", CONTENT)
    pulling = asyncio.create_task(link.pull(asset))
    decode = wire.decoder(ASSETS)

    async def answer() -> bytes:
        assert await asyncio.to_thread(router.socket.poll, PATIENCE_SECONDS * 1000)
        peer, frame = router.receive() or (b"", b"")
        get = decode(frame).message
        assert isinstance(get, AssetGet)
        router.send(peer, wire.encode(chunk_of(get.sha256, CONTENT, get.offset)))
        return peer

    async with asyncio.timeout(PATIENCE_SECONDS):
        peer = await answer()
        assert await pulling == CONTENT
        # Once all is read, something that nobody asked for makes the socket readable until somebody reads it.
        assert link._dealer.receive() is None
        router.send(peer, wire.encode(chunk_of(asset.sha256, CONTENT, 0)))
        descriptor = link._dealer.socket.fileno()
        readable, _, _ = await asyncio.to_thread(select.select, [descriptor], [], [], PATIENCE_SECONDS)
        assert readable
        before = time.process_time()
        await asyncio.sleep(WATCHED_SECONDS)
        assert time.process_time() - before < WATCHED_SECONDS / 10

        pulling = asyncio.create_task(link.pull(asset))  # and what came meanwhile does no harm
        await answer()
        assert await pulling == CONTENT
    link.close()
    router.close()
    context.term()
