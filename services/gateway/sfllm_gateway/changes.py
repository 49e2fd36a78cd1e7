"""Wakes requests that wait until this gateway can serve them."""

from __future__ import annotations

import asyncio


class Changes:
    """Told of every change of what can be served: scheduler found or lost, models, tokenizers."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        """Something changed: whoever waits looks again."""
        self._event.set()
        self._event.clear()

    async def wait(self, seconds: float) -> None:
        """Until the next change, but no longer than `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return
