"""Which choices are open here, and their digest, which every beat carries. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from sfllm import holdings, wire
from sfllm.holdings import OpenChoice


class HeldChoices:
    """The open choices of the gateway `identity`. Invariant: `digest` is `holdings.digest` of them."""

    def __init__(self, identity: bytes) -> None:
        self._identity = identity
        self._open: dict[int, set[OpenChoice]] = {}
        self.digest = 0

    def set(self, handle: int, attempt: int, choices: Iterable[int]) -> None:
        """From now on these choices of a request are open, at this attempt, and no others."""
        before = self._open.get(handle, set())
        after = {OpenChoice(self._identity, handle, attempt, choice) for choice in choices}
        self.digest ^= holdings.digest(before ^ after)
        if after:
            self._open[handle] = after
        else:
            self._open.pop(handle, None)

    def arrays(self) -> tuple[wire.Array, ...]:
        """Handles, attempts and choices, as `GatewayHeld` carries them."""
        every = [held for choices in self._open.values() for held in sorted(choices)]
        return (
            wire.as_array("Q", (held.handle for held in every)),
            wire.as_array("I", (held.attempt for held in every)),
            wire.as_array("I", (held.choice for held in every)),
        )
