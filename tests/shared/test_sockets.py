"""ROUTER and DEALER links over real sockets."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from sfllm.sockets import (
    DealerLink,
    Outbox,
    OutboxFullError,
    PeerUnreachableError,
    RouterLink,
    random_identity,
)

PATIENCE_SECONDS = 20.0
MESSAGE_BYTES = 4096
SOME_WAIT = 16_000
"""Messages of that size: more than both high-water marks and the kernel's buffers take, so some wait."""


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


def until(condition: Callable[[], object], *sockets: zmq.Socket[bytes]) -> None:
    """Wait for events of the sockets until the condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        for socket in sockets:
            socket.poll(10)


def connected(context: zmq.Context[zmq.Socket[bytes]]) -> tuple[RouterLink, DealerLink]:
    router = RouterLink(context, "tcp://127.0.0.1:*")
    dealer = DealerLink(context, router.address, b"peer")
    dealer.send(b"hello")
    received: list[tuple[bytes, bytes]] = []

    def arrived() -> bool:
        dealer.flush()
        message = router.receive()
        if message is not None:
            received.append(message)
        return bool(received)

    until(arrived, router.socket)
    assert received == [(b"peer", b"hello")]
    return router, dealer


def send_many(router: RouterLink, count: int) -> None:
    """Numbered messages to a peer that does not read."""
    for number in range(count):
        router.send(b"peer", number.to_bytes(4, "little") + bytes(MESSAGE_BYTES - 4))


def test_messages_go_both_ways_in_order(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    router, dealer = connected(context)
    for number in range(100):
        router.send(b"peer", b"%d" % number)
    received: list[bytes] = []

    def all_here() -> bool:
        while (message := dealer.receive()) is not None:
            received.append(message)
        return len(received) == 100

    until(all_here, dealer.socket)
    assert received == [b"%d" % number for number in range(100)]


def test_an_unknown_peer_is_an_error_for_the_sender(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    router = RouterLink(context, "tcp://127.0.0.1:*")
    with pytest.raises(PeerUnreachableError):
        router.send(b"nobody", b"x")
    assert not router.has_waiting


def test_what_was_sent_before_the_connection_arrives_later(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/late"
    dealer = DealerLink(context, address, b"early")
    dealer.send(b"one")
    dealer.send(b"two")
    router = RouterLink(context, address)
    received: list[bytes] = []

    def both_here() -> bool:
        dealer.flush()
        message = router.receive()
        if message is not None:
            received.append(message[1])
        return len(received) == 2

    until(both_here, router.socket)
    assert received == [b"one", b"two"]


def test_a_peer_that_takes_nothing_fills_its_outbox_and_no_further(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    router, _dealer = connected(context)
    with pytest.raises(OutboxFullError, match="wait for a peer that takes none"):
        send_many(router, 1_000_000)
    assert router.has_waiting
    router.forget(b"peer")
    assert not router.has_waiting


def test_a_slow_peer_gets_everything_once_it_reads_again(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    router, dealer = connected(context)
    send_many(router, SOME_WAIT)
    assert router.has_waiting
    received: list[int] = []

    def all_here() -> bool:
        assert router.flush() == []
        while (message := dealer.receive()) is not None:
            received.append(int.from_bytes(message[:4], "little"))
        return len(received) == SOME_WAIT

    until(all_here, dealer.socket)
    assert received == list(range(SOME_WAIT))
    assert not router.has_waiting


def test_flush_names_peers_that_are_gone(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    router, dealer = connected(context)
    send_many(router, SOME_WAIT)
    assert router.has_waiting
    dealer.close()
    gone: list[bytes] = []
    until(lambda: gone.extend(router.flush()) or gone, router.socket)
    assert gone == [b"peer"]
    assert not router.has_waiting


def test_an_address_in_use_is_an_error_and_leaves_nothing_open(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    router = RouterLink(context, "tcp://127.0.0.1:*")
    other: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with pytest.raises(zmq.ZMQError):
        RouterLink(other, router.address)
    other.term()  # would wait for ever for a socket left open


def test_an_outbox_is_bounded_in_bytes_and_keeps_the_order() -> None:
    outbox = Outbox(limit_bytes=10)
    outbox.append(b"12345")
    outbox.append(b"6789")
    with pytest.raises(OutboxFullError, match="9 bytes wait"):
        outbox.append(b"xx")
    assert (len(outbox), outbox.size_bytes) == (2, 9)
    assert outbox.first() == b"12345"
    outbox.pop()
    outbox.pop()
    assert (len(outbox), outbox.size_bytes) == (0, 0)


def test_identities_differ_and_keep_their_prefix() -> None:
    identities = {random_identity(b"g-") for _ in range(100)}
    assert len(identities) == 100
    assert all(identity.startswith(b"g-") for identity in identities)


def test_what_arrived_before_the_connection_ended_can_still_be_read(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    router, dealer = connected(context)
    for number in range(2000):
        router.send(b"peer", b"%d" % number)
    received: list[bytes] = []

    def read() -> bool:
        message = dealer.receive()
        if message is not None:
            received.append(message)
        return message is None

    until(lambda: not read(), dealer.socket)
    router.close()
    until(lambda: read() and len(received) == 2000, dealer.socket)
    assert [int(message) for message in received] == list(range(2000))


@pytest.mark.parametrize("frames", [[b"", b"body"], [b"one", b"two", b"three"]])
def test_a_message_of_several_frames_arrives_as_an_empty_one(
    context: zmq.Context[zmq.Socket[bytes]], frames: list[bytes]
) -> None:
    router, dealer = connected(context)
    dealer.socket.send_multipart(frames)
    dealer.send(b"next")
    received: list[tuple[bytes, bytes]] = []

    def received_both() -> bool:
        message = router.receive()
        if message is not None:
            received.append(message)
        return len(received) == 2

    until(received_both, router.socket)
    assert received == [(b"peer", b""), (b"peer", b"next")]
    router.socket.send_multipart([b"peer", *frames])
    router.send(b"peer", b"after")
    answers: list[bytes] = []

    def both_here() -> bool:
        message = dealer.receive()
        if message is not None:
            answers.append(message)
        return len(answers) == 2

    until(both_here, dealer.socket)
    assert answers == [b"", b"after"]


def test_a_watched_link_tells_how_long_its_connection_has_been_lost(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/router"
    dealer = DealerLink(context, address, b"peer", watched=True)
    assert dealer.seconds_lost(0.0) == 0.0  # nothing was there yet
    router = RouterLink(context, address)
    dealer.send(b"hello")
    until(router.receive, router.socket)
    assert dealer.seconds_lost(1.0) == 0.0
    router.close()
    clock = itertools.count(2)
    until(lambda: dealer.seconds_lost(next(clock)) == 3.0)
    router = RouterLink(context, address)
    dealer.send(b"again")
    until(router.receive, router.socket)
    until(lambda: dealer.seconds_lost(next(clock)) == 0.0)
    dealer.close()
    router.close()
