"""The format of flight records: what the core was told, when, and a digest of what it decided.

A record is a line of magic, a header and blocks. Header and blocks alike are framed by their size and
CRC-32 (uint32 each, little-endian); the header is one MessagePack map, a block is compressed (zlib) and
holds entries in MessagePack, each behind its size (uint32). Messages inside are in their wire encoding.

Whoever reads a record learns who asked when for how much, not what: token ids, log probabilities and cache
salts are left out. Of arrays of ids only the lengths are kept, and a replay fills in zeros; nothing is
decided by them. (The names of beginnings of prompts, which decide the choice of workers, are kept: they
are keyed hashes.) Digests of decisions cover the same parts, so both sides can be compared.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from struct import Struct
from typing import NamedTuple

import msgspec

from sfllm.messages import (
    GATEWAY_TO_SCHEDULER,
    WORKER_TO_SCHEDULER,
    Finished,
    Grant,
    Message,
    ModelCard,
    PromptLogprobs,
    Submit,
    Tokens,
    WorkerFinished,
    WorkerPromptLogprobs,
    WorkerTokens,
)
from sfllm.token_batch import ROW_NUMBERS
from sfllm.wire import DECODE_ERRORS, PROTOCOL_VERSION, Array, decoder, encode
from sfllm_scheduler.core.events import (
    Action,
    Event,
    ForgetGateway,
    ForgetWorker,
    FromGateway,
    FromWorker,
    GatewayUnreachable,
    ModelReady,
    NeedAssets,
    Record,
    Tick,
    ToGateway,
    ToWorker,
    WorkerUnreachable,
)
from sfllm_scheduler.core.state import PolicyValues

FORMAT_VERSION = 1
MAGIC = b"sfllm flight record\n"
MAX_BLOCK_BYTES = 64 * 2**20
DIGEST_BYTES = 8

_FRAME = Struct("<II")
_SIZE = Struct("<I")


class RecordError(Exception):
    """The file is no flight record, of another version, or damaged; the text says which."""


class Header(msgspec.Struct, frozen=True):
    """What a replay starts from. `format` and `protocol` must be the reader's own."""

    format: int
    protocol: int
    sfllm: str
    epoch: int
    policy: PolicyValues


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One event and what came of it.

    `kind` is a place in `KINDS`, or `FULL`. `peer` is who the event is about, `content` its message or card,
    `lengths` those of the message's arrays if not all of them is in it. `decisions` names every action by a
    byte (`decision_code`), None when the core raised an exception; `digest` covers all of them.
    """

    time: float
    kind: int
    peer: bytes
    content: bytes
    lengths: tuple[int, ...]
    decisions: bytes | None
    digest: bytes


KINDS: tuple[type[Event], ...] = (
    Tick,
    FromGateway,
    FromWorker,
    GatewayUnreachable,
    WorkerUnreachable,
    ModelReady,
)
FULL = 255
"""The kind of the last entry of a record that reached its bound: what came later is not in it."""

_OTHER_ACTIONS: tuple[type[Action], ...] = (Record, NeedAssets, ForgetGateway, ForgetWorker)
_OTHER_CODES = 200

_KIND_OF = {cls: number for number, cls in enumerate(KINDS)}
_CODE_OF = {cls: _OTHER_CODES + number for number, cls in enumerate(_OTHER_ACTIONS)}
_TOKEN_ROWS = frozenset((Tokens, WorkerTokens))
_KEPT: dict[type[Message], tuple[int | None, ...]] = {
    Submit: (0, 0, None),
    Grant: (0, 0, None),
    Tokens: (None, ROW_NUMBERS, 0),
    WorkerTokens: (None, ROW_NUMBERS, 0),
    PromptLogprobs: (0, 0),
    WorkerPromptLogprobs: (0, 0),
    Finished: (0,),
    WorkerFinished: (0,),
}
"""How many leading elements of each array are kept, None for all; of token rows so many for each row."""

_pack = msgspec.msgpack.Encoder().encode
_unpack_entry = msgspec.msgpack.Decoder(Entry).decode
_unpack_header = msgspec.msgpack.Decoder(Header).decode
_unpack_card = msgspec.msgpack.Decoder(ModelCard).decode
_decode = {FromGateway: decoder(GATEWAY_TO_SCHEDULER), FromWorker: decoder(WORKER_TO_SCHEDULER)}


def make_entry(event: Event, now: float, actions: Sequence[Action] | None) -> bytes:
    """An entry behind its size. `actions` is what the core gave for the event, None if it raised."""
    peer, content = b"", b""
    lengths: tuple[int, ...] = ()
    match event:
        case FromGateway() | FromWorker():
            peer = event.peer
            content, lengths = _without_ids(event.message, event.arrays)
        case GatewayUnreachable() | WorkerUnreachable():
            peer = event.peer
        case ModelReady():
            content = _pack(event.card)
    codes = None if actions is None else bytes(map(decision_code, actions))
    packed = _pack(Entry(now, _KIND_OF[type(event)], peer, content, lengths, codes, digest(actions or ())))
    return _SIZE.pack(len(packed)) + packed


def full_entry(now: float) -> bytes:
    """The last entry of a record that reached its bound."""
    packed = _pack(Entry(now, FULL, b"", b"", (), b"", b""))
    return _SIZE.pack(len(packed)) + packed


def event_of(entry: Entry) -> Event:
    """The event that an entry tells of, with zeros for what was left out. Raises `RecordError`."""
    try:
        cls = KINDS[entry.kind]
        if cls is FromGateway or cls is FromWorker:
            message, arrays = _decode[cls](entry.content)
            if entry.lengths:
                arrays = tuple(map(_filled, arrays, message.array_types, entry.lengths))
            return cls(entry.peer, message, arrays)
        if cls is GatewayUnreachable or cls is WorkerUnreachable:
            return cls(entry.peer)
        return ModelReady(_unpack_card(entry.content)) if cls is ModelReady else Tick()
    except (*DECODE_ERRORS, IndexError, MemoryError) as error:
        raise RecordError(f"an event cannot be read: {error}") from error


def decision_code(action: Action) -> int:
    """A byte for the kind of an action: of a message that is sent, the message's kind."""
    if isinstance(action, ToGateway | ToWorker):
        return action.message.kind
    return _CODE_OF[type(action)]


def digest(actions: Sequence[Action]) -> bytes:
    """A digest of actions in order: receivers, messages and records, without ids of tokens."""
    if not actions:
        return b""
    made = blake2b(digest_size=DIGEST_BYTES)
    for action in actions:
        match action:
            case ToGateway() | ToWorker():
                content, lengths = _without_ids(action.message, action.arrays)
                parts: tuple[object, ...] = (action.peer, content, lengths)
            case Record():
                parts = (action.event, action.fields)
            case NeedAssets():
                parts = (action.peer, action.card)
            case _:
                parts = (action.peer,)
        made.update(_pack((decision_code(action), *parts)))
    return made.digest()


def _without_ids(message: Message, arrays: Sequence[Array]) -> tuple[bytes, tuple[int, ...]]:
    """A message as a frame, and the lengths of its arrays if some of what they have is left out."""
    kept = _KEPT.get(type(message))
    if kept is None:
        return encode(message, *arrays), ()
    if isinstance(message, Submit) and message.cache_salt:
        message = msgspec.structs.replace(message, cache_salt="")
    elif isinstance(message, Grant) and any(request.cache_salt for request in message.requests):
        requests = [msgspec.structs.replace(request, cache_salt="") for request in message.requests]
        message = Grant(message.lease, tuple(requests))
    times = len(arrays[0]) if type(message) in _TOKEN_ROWS else 1
    parts = [
        array if most is None else array[: most * times] for array, most in zip(arrays, kept, strict=True)
    ]
    return encode(message, *parts), tuple(map(len, arrays))


def _filled(kept: Array, code: str, length: int) -> Array:
    """What was kept of an array, and zeros up to its length."""
    missing = length - len(kept)
    if missing <= 0:
        return kept
    return memoryview(bytes(kept) + bytes(missing * kept.itemsize)).cast(code)  # type: ignore[call-overload, no-any-return]  # which of the three is data


# the file ---------------------------------------------------------------------------------------


def opening(sfllm: str, epoch: int, policy: PolicyValues) -> bytes:
    """How a record begins: magic and header."""
    return MAGIC + _framed(_pack(Header(FORMAT_VERSION, PROTOCOL_VERSION, sfllm, epoch, policy)))


def block(entries: bytes) -> bytes:
    """Entries, one after another, as one block."""
    return _framed(zlib.compress(entries, 1))


class FlightRecord:
    """A record that is read. `cut_off` is set when its last block is not whole: the writer was killed then.

    `parts` is what the file has, in pieces of any size; one block is kept at a time. Raises `RecordError`.
    """

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts = iter(parts)
        self._buffer = b""
        self.cut_off = False
        if self._take(len(MAGIC)) != MAGIC:
            raise RecordError("this is no flight record")
        content = self._frame()
        if content is None:
            raise RecordError("the record ends before its header does")
        self.header = _header(content)

    def entries(self) -> Iterator[Entry]:
        """What happened, in order. Raises `RecordError` where the file is damaged."""
        while (content := self._frame()) is not None:
            yield from _entries(content)

    def _frame(self) -> bytes | None:
        """The content of the next frame; None at the end, wherever that is."""
        head = self._take(_FRAME.size)
        if len(head) < _FRAME.size:
            self.cut_off = bool(head)
            return None
        size, checksum = _FRAME.unpack(head)
        if size > MAX_BLOCK_BYTES:
            raise RecordError(f"the record is damaged: a block of {size} bytes is announced")
        content = self._take(size)
        if len(content) < size:
            self.cut_off = True
            return None
        if zlib.crc32(content) != checksum:
            raise RecordError("the record is damaged: a checksum is wrong")
        return content

    def _take(self, size: int) -> bytes:
        """The next bytes of the file, fewer at its end."""
        while len(self._buffer) < size:
            part = next(self._parts, b"")
            if not part:
                break
            self._buffer += part
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken


def _framed(content: bytes) -> bytes:
    return _FRAME.pack(len(content), zlib.crc32(content)) + content


class _Versions(NamedTuple):
    """Read before anything else of a header, which another version may spell otherwise."""

    format: int
    protocol: int


def _header(content: bytes) -> Header:
    try:
        found = msgspec.msgpack.decode(content)
        versions = _Versions(found["format"], found["protocol"])
        if versions != (FORMAT_VERSION, PROTOCOL_VERSION):
            raise RecordError(
                f"the record has format {versions.format} and protocol {versions.protocol}, "
                f"and this sfllm reads format {FORMAT_VERSION} and protocol {PROTOCOL_VERSION}"
            )
        return _unpack_header(content)
    except (*DECODE_ERRORS, KeyError, TypeError) as error:
        raise RecordError(f"the record's header cannot be read: {error}") from error


def _entries(content: bytes) -> Iterator[Entry]:
    """The entries of a block. Raises `RecordError`."""
    unpacker = zlib.decompressobj()
    try:
        entries = memoryview(unpacker.decompress(content, MAX_BLOCK_BYTES))
        start = 0
        while start < len(entries):
            (size,) = _SIZE.unpack_from(entries, start)
            start += _SIZE.size
            yield _unpack_entry(entries[start : start + size])
            start += size
    except (*DECODE_ERRORS, zlib.error, ValueError, TypeError) as error:
        raise RecordError(f"the record is damaged: {error}") from error
