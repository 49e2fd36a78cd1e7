"""Messages that are encoded once and differ in a number only."""

from __future__ import annotations

from sfllm.messages import Message
from sfllm.wire import Array, encode

MARK = 0x7EDCBA9876543210
"""A number that MessagePack writes in nine bytes: a type byte and this, big-endian. Any that takes its place
must be as large, so that it is written in as many."""

FIRST_NUMBER = 1 << 40
_BYTES = 8


class Template:
    """A message in which `MARK` stands for the number that is filled in."""

    def __init__(self, message: Message, *arrays: Array) -> None:
        frame = encode(message, *arrays)
        self._before, self._after = frame.split(MARK.to_bytes(_BYTES, "big"))

    def fill(self, number: int) -> bytes:
        """The frame with that number, which is at least `FIRST_NUMBER`."""
        return self._before + number.to_bytes(_BYTES, "big") + self._after
