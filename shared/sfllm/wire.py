"""Messages to frames and back.

A message is a list of frames: a four-byte header (`SF`, protocol version, message
kind), one MessagePack frame, and the message's arrays. Decoding believes nothing:
whatever a peer sends, the outcome is a message or a `WireError` that says why.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from sfllm.messages import Message

PROTOCOL_VERSION = 1
MAGIC = b"SF"

Frame = bytes | bytearray | memoryview
Array = memoryview
"""A read-only view of unsigned integers or floats, as a frame arrived or as it will leave."""

# Everything that msgspec's decoders raise on hostile bytes: UnicodeDecodeError is a ValueError
# and RecursionError comes from deep nesting; neither is a MsgspecError.
DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError)

if sys.byteorder != "little":  # pragma: no cover - no such machine runs this
    raise ImportError("sfllm sends arrays as little-endian memory and runs on little-endian machines only")


class WireError(ValueError):
    """Frames that are not a message of this link; the text says what is wrong with them."""


class Decoded(NamedTuple):
    """A message and its arrays, in the order of its `array_types`."""

    message: Message
    arrays: tuple[Array, ...]


_encode = msgspec.msgpack.Encoder().encode


def as_array(code: str, values: Iterable[float]) -> Array:
    """`values` as a view that `encode` accepts. Raises OverflowError when one does not fit."""
    return memoryview(array(code, values))


def encode(message: Message, *arrays: Array) -> list[Frame]:
    """The frames of `message` with its arrays, which are not copied."""
    codes = "".join(view.format for view in arrays)
    if codes != message.array_types:
        raise WireError(f"{type(message).__name__} carries arrays {message.array_types!r}, got {codes!r}")
    header = MAGIC + bytes((PROTOCOL_VERSION, message.kind))
    return [header, _encode(message), *(view.cast("B") for view in arrays)]


def decoder(kinds: Iterable[type[Message]]) -> Callable[[Sequence[Frame]], Decoded]:
    """A function that decodes frames of one direction of one link, where only `kinds` are allowed."""
    known: dict[int, tuple[type[Message], msgspec.msgpack.Decoder[Any]]] = {
        cls.kind: (cls, msgspec.msgpack.Decoder(cls)) for cls in kinds
    }

    def decode(frames: Sequence[Frame]) -> Decoded:
        if len(frames) < 2:
            raise WireError(f"expected a header and a body, got {len(frames)} frames")
        cls, body_decoder = _lookup(bytes(frames[0]), known)
        try:
            message: Message = body_decoder.decode(frames[1])
        except DECODE_ERRORS as error:
            raise WireError(f"malformed {cls.__name__}: {str(error)[:200]}") from error
        return Decoded(message, _arrays(cls, frames[2:]))

    return decode


def _lookup(
    header: bytes, known: dict[int, tuple[type[Message], msgspec.msgpack.Decoder[Any]]]
) -> tuple[type[Message], msgspec.msgpack.Decoder[Any]]:
    if len(header) != 4 or header[:2] != MAGIC:
        raise WireError("not an sfllm message (bad header)")
    version, kind = header[2], header[3]
    if version != PROTOCOL_VERSION:
        raise WireError(
            f"peer speaks protocol version {version}, this process {PROTOCOL_VERSION}: upgrade one"
        )
    if kind not in known:
        raise WireError(f"message kind {kind} does not belong on this link")
    return known[kind]


def _arrays(cls: type[Message], frames: Sequence[Frame]) -> tuple[Array, ...]:
    if len(frames) != len(cls.array_types):
        raise WireError(f"{cls.__name__} carries {len(cls.array_types)} arrays, got {len(frames)}")
    views = []
    for code, frame in zip(cls.array_types, frames, strict=True):
        view = memoryview(frame)
        if view.nbytes % array(code).itemsize:
            raise WireError(
                f"an array of {cls.__name__} has {view.nbytes} bytes, not a multiple of its items"
            )
        views.append(_cast(view, code))
    return tuple(views)


def _cast(view: memoryview, code: str) -> Array:
    plain = view.cast("B")
    if code == "f":
        return plain.cast("f")  # type: ignore[return-value]  # one type for all columns, whatever they hold
    return plain.cast("Q" if code == "Q" else "I")
