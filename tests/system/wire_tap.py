"""Listening on a network: every packet, the bytes of each connection, and what sfllm's messages in them say.

It knows the protocol and ZeroMQ's framing and looks for each message where one could begin, as somebody
would who wants to read along.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

from namespaces import socket_within

from sfllm.messages import Grant, WorkerTokens
from sfllm.token_batch import rows
from sfllm.wire import MAGIC, Decoded, WireError, as_array, decoder

_EVERY_PROTOCOL = 0x0003
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 32 * 2**20
_LARGEST_FRAME_BYTES = 2**17
_IPV4, _TCP = 0x0800, 6

_decode = decoder((Grant, WorkerTokens))


class Tap:
    """Keeps every frame that passes an interface, from `__enter__` to `__exit__`."""

    def __init__(self, namespace: str, interface: str) -> None:
        self.frames: list[bytes] = []
        self.lost = 0
        """Frames that came faster than they could be kept."""
        self._stop = threading.Event()
        self._socket = socket_within(namespace, socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._socket.settimeout(0.05)
        self._interface = interface
        self._thread = threading.Thread(target=self._listen)

    def __enter__(self) -> Tap:
        self._socket.bind((self._interface, _EVERY_PROTOCOL))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        _, self.lost = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        self._socket.close()

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                self.frames.append(self._socket.recv(_LARGEST_FRAME_BYTES))
            except TimeoutError:
                continue


class Overheard(NamedTuple):
    """What somebody on the network learned: all bytes, and the texts of prompts and answers in messages."""

    raw: bytes
    prompts: tuple[str, ...]
    answers: tuple[str, ...]

    def knows(self, text: str) -> list[str]:
        """Where `text` was seen, whose tokens are its bytes: in which form, nowhere if it is a secret."""
        found = ["text"] if text.encode() in self.raw else []
        found += ["token ids"] if as_array("I", list(text.encode())).tobytes() in self.raw else []
        found += ["prompts"] if any(text in each for each in self.prompts) else []
        found += ["answers"] if any(text in each for each in self.answers) else []
        return found


def overheard(frames: Sequence[bytes]) -> Overheard:
    """Put connections together again and read what can be read."""
    streams = _connections(frames)
    prompts: list[str] = []
    answers: dict[tuple[object, ...], dict[int, int]] = defaultdict(dict)
    for connection, stream in streams.items():
        for message, arrays in _messages(stream):
            if isinstance(message, Grant):
                prompts.append(_text(arrays[0]))
                continue
            for row in rows(arrays):
                answer = answers[(connection, row.handle, row.choice)]
                answer.update(enumerate(row.ids, start=row.start))
    texts = [_text([ids[position] for position in sorted(ids)]) for ids in answers.values()]
    return Overheard(b"\n".join(streams.values()), tuple(prompts), tuple(texts))


def _text(ids: Sequence[int]) -> str:
    return bytes(id_ for id_ in ids if id_ < 256).decode(errors="replace")


def _messages(stream: bytes) -> Iterator[Decoded]:
    """Every message whose ZeroMQ frame stands before it with a size of one or of eight bytes."""
    start = stream.find(MAGIC)
    while start > 0:
        for size in (stream[start - 1], int.from_bytes(stream[max(0, start - 8) : start])):
            frame = stream[start : start + size] if size <= _BUFFER_BYTES else b""
            try:
                yield _decode(frame)
            except WireError:
                continue
        start = stream.find(MAGIC, start + 1)


def _connections(frames: Sequence[bytes]) -> dict[bytes, bytes]:
    """What each end of each TCP connection sent, in order, by addresses and ports."""
    parts: dict[bytes, dict[int, bytes]] = defaultdict(dict)
    for frame in frames:
        packet = frame[14:]
        if len(packet) < 20 or int.from_bytes(frame[12:14]) != _IPV4 or packet[9] != _TCP:
            continue
        header = (packet[0] & 15) * 4
        segment = packet[header : int.from_bytes(packet[2:4])]
        payload = segment[(segment[12] >> 4) * 4 :]
        if payload:
            sequence_number = int.from_bytes(segment[4:8])
            parts[packet[12:20] + segment[:4]][sequence_number] = payload
    return {
        connection: b"".join(found[number] for number in sorted(found)) for connection, found in parts.items()
    }
