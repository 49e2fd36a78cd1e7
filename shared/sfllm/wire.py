"""Messages to bytes and back.

A message is one frame: `SF`, protocol version and kind (four bytes), the sizes in bytes of its body and
of each of its arrays (uint32), the arrays one after another, and the body in MessagePack. One frame,
because a socket's calls for each frame cost more than copying a few arrays together. Decoding believes
nothing: whatever a peer sends, the outcome is a message or a `WireError` that says why.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable
from functools import cache
from struct import Struct
from typing import NamedTuple

import msgspec

from sfllm.messages import Message

PROTOCOL_VERSION = 4
MAGIC = b"SF"

Array = memoryview
"""A read-only view of unsigned integers or floats, as it arrived or as it will leave."""

# Everything that msgspec's decoders raise on hostile bytes: UnicodeDecodeError is a ValueError
# and RecursionError comes from deep nesting; neither is a MsgspecError.
DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError)

if sys.byteorder != "little":  # pragma: no cover - no such machine runs this
    raise ImportError("sfllm sends arrays as little-endian memory and runs on little-endian machines only")


class WireError(ValueError):
    """Bytes that are not a message of this link; the text says what is wrong with them."""


class VersionError(WireError):
    """A frame of another version of the protocol."""


class Decoded(NamedTuple):
    """A message and its arrays, in the order of its `array_types`."""

    message: Message
    arrays: tuple[Array, ...]


_encode = msgspec.msgpack.Encoder().encode


def as_array(code: str, values: Iterable[float]) -> Array:
    """`values` as a view that `encode` accepts. Raises OverflowError when one does not fit."""
    return memoryview(array(code, values))


def encode(message: Message, *arrays: Array) -> bytes:
    """`message` with its arrays as one frame."""
    codes = "".join([view.format for view in arrays])
    if codes != message.array_types:
        raise WireError(f"{type(message).__name__} carries arrays {message.array_types!r}, got {codes!r}")
    body = _encode(message)
    sizes = [view.nbytes for view in arrays]
    header = _header(len(arrays)).pack(MAGIC, PROTOCOL_VERSION, message.kind, len(body), *sizes)
    return b"".join((header, *arrays, body))


def version_notice() -> bytes:
    """What tells a peer of any other version which one this process speaks: no message follows it.

    A frame's first four bytes are the same in every version, so whoever decodes it gets a `VersionError`.
    """
    return MAGIC + bytes((PROTOCOL_VERSION, 0))


class _Kind(NamedTuple):
    """What decoding needs to know of one kind of message."""

    message: type[Message]
    decode_body: Callable[[memoryview], Message]
    header: Struct


def decoder(kinds: Iterable[type[Message]]) -> Callable[[bytes], Decoded]:
    """A function that decodes frames of one direction of one link, where only `kinds` are allowed."""
    known = {
        cls.kind: _Kind(cls, msgspec.msgpack.Decoder(cls).decode, _header(len(cls.array_types)))
        for cls in kinds
    }

    def decode(frame: bytes) -> Decoded:
        cls, decode_body, header = _kind_of(frame, known)
        if len(frame) < header.size:
            raise WireError(f"{cls.__name__} is cut off after {len(frame)} bytes")
        body_size, *sizes = header.unpack_from(frame)[3:]
        view = memoryview(frame)
        start = header.size
        arrays = []
        for code, size in zip(cls.array_types, sizes, strict=True):
            arrays.append(_cast(view[start : start + size], code, cls))
            start += size
        if start + body_size != len(frame):
            raise WireError(f"{cls.__name__} announces {start + body_size} bytes, but {len(frame)} came")
        try:
            return Decoded(decode_body(view[start:]), tuple(arrays))
        except DECODE_ERRORS as error:
            raise WireError(f"malformed {cls.__name__}: {str(error)[:200]}") from error

    return decode


@cache
def _header(array_count: int) -> Struct:
    """Magic, version, kind, the body's size, each array's size."""
    return Struct(f"<2sBBI{array_count}I")


def _kind_of(frame: bytes, known: dict[int, _Kind]) -> _Kind:
    if len(frame) < 4 or frame[:2] != MAGIC:
        raise WireError("not an sfllm message (bad header)")
    version, kind = frame[2], frame[3]
    if version != PROTOCOL_VERSION:
        raise VersionError(
            f"peer speaks protocol version {version}, this process {PROTOCOL_VERSION}: upgrade one"
        )
    if kind not in known:
        raise WireError(f"message kind {kind} does not belong on this link")
    return known[kind]


_ITEM_BYTES = {"I": 4, "Q": 8, "f": 4}


def _cast(view: memoryview, code: str, cls: type[Message]) -> Array:
    if view.nbytes % _ITEM_BYTES[code]:
        raise WireError(f"an array of {cls.__name__} has {view.nbytes} bytes, not a multiple of its items")
    return view.cast(code)  # type: ignore[call-overload, no-any-return]  # which of the three is data
