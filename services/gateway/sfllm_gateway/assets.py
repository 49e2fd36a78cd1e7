"""Pulling tokenizer files from schedulers, on sockets of their own, one chunk at a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

import structlog
import zmq

from sfllm import wire
from sfllm.asset_pull import AssetError, AssetPull
from sfllm.link_keys import ClientKeys
from sfllm.messages import ASSETS, Asset, AssetChunk
from sfllm.sockets import DealerLink

CHUNK_TIMEOUT_SECONDS = 2.0
TRIES = 5
RETRY_SECONDS = 0.5

log = structlog.get_logger()


class AssetLinks:
    """A link to each scheduler of `addresses`. Owns the sockets until `close`; lives on one event loop."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        addresses: Sequence[str],
        identity: bytes,
        keys: ClientKeys | None = None,
    ) -> None:
        self._links = [AssetLink(context, address, identity, keys) for address in addresses]

    async def pull(self, asset: Asset, holders: Sequence[int]) -> bytes:
        """The content, its hash checked, from one of the schedulers that should have it, or else from any.

        Raises `AssetError` when none of them gives it.
        """
        failure = AssetError("there is no scheduler")
        for index in holders or range(len(self._links)):
            try:
                return await self._links[index].pull(asset)
            except AssetError as error:
                failure = error
        raise failure

    def close(self) -> None:
        """Close the sockets."""
        for link in self._links:
            link.close()


class AssetLink:
    """Pulls one asset at a time. Owns its socket until `close`; lives on one event loop."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        identity: bytes,
        keys: ClientKeys | None = None,
    ) -> None:
        self._dealer = DealerLink(context, address, identity, keys=keys)
        self._decode = wire.decoder(ASSETS)
        self._lock = asyncio.Lock()
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._descriptor = self._dealer.socket.fileno()
        self._timer = self._loop.call_later(RETRY_SECONDS, self._retry)

    async def pull(self, asset: Asset) -> bytes:
        """The content, its hash checked. Raises `AssetError` when it cannot be had."""
        async with self._lock, self._listening():
            pull = AssetPull(asset)
            silent = 0
            self._ask(pull)
            while silent < TRIES:
                chunk = await self._next_chunk()
                if chunk is None:
                    silent += 1
                elif chunk.sha256 != asset.sha256:
                    continue  # a late answer about another asset
                else:
                    silent = 0
                    content = pull.add(chunk)
                    if content is not None:
                        return content
                self._ask(pull)
        raise AssetError(f"no answer about {asset.name} in {TRIES * CHUNK_TIMEOUT_SECONDS:.0f} s")

    def close(self) -> None:
        """Close the socket."""
        self._timer.cancel()
        self._dealer.close()

    def _retry(self) -> None:
        """Try again after a refusal, also between pulls (see `refusal`); the other link tells why."""
        self._timer = self._loop.call_later(RETRY_SECONDS, self._retry)
        self._dealer.refusal(time.monotonic())

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        """Have the loop watch the socket while somebody reads it.

        The descriptor stays readable until the socket is looked at, and a loop that watches it without
        anybody to look spins: between two pulls libzmq may still have something to say.
        """
        self._loop.add_reader(self._descriptor, self._arrived.set)
        try:
            yield
        finally:
            self._loop.remove_reader(self._descriptor)

    def _ask(self, pull: AssetPull) -> None:
        self._dealer.clear()
        self._dealer.send(wire.encode(pull.request()))
        self._arrived.set()  # edge-triggered: whatever came during the send must be looked at

    async def _next_chunk(self) -> AssetChunk | None:
        """The next chunk, None after the timeout."""
        try:
            async with asyncio.timeout(CHUNK_TIMEOUT_SECONDS):
                while True:
                    self._arrived.clear()
                    self._dealer.flush()
                    frame = self._dealer.receive()
                    if frame is None:
                        await self._arrived.wait()
                        continue
                    try:
                        message = self._decode(frame).message
                    except wire.WireError as error:
                        log.warning("malformed asset message", reason=str(error))
                        continue
                    if isinstance(message, AssetChunk):
                        return message
        except TimeoutError:
            return None
