"""ROUTER and DEALER sockets that neither block nor lose a message in silence.

Both links send without blocking. What the kernel or a slow peer does not take waits in
a bounded outbox and leaves in order when it can; an outbox that is full is an error for
the caller, never a dropped message. A ROUTER learns of a dead peer from the failed send.

A libzmq file descriptor is edge-triggered: it fires once when something changed. After
every send and every drain, look at the socket again (`receive` until it gives None,
`flush`), or an event that came in between is never seen.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import deque

import zmq
from zmq.utils.monitor import recv_monitor_message

from sfllm.link_auth import LinkAuthenticator
from sfllm.link_keys import ClientKeys

MAX_MESSAGE_BYTES = 32 * 2**20
"""A larger message ends the connection: no peer can make a service allocate without bound."""

OUTBOX_BYTES = 64 * 2**20
HIGH_WATER_MARK_MESSAGES = 4096
LINGER_MILLISECONDS = 500
HEARTBEAT_INTERVAL_MILLISECONDS = 500
HEARTBEAT_TIMEOUT_MILLISECONDS = 2000

RECONNECT_MILLISECONDS, RECONNECT_LONGEST_MILLISECONDS = 50, 1000

CONNECT_TIMEOUT_MILLISECONDS = 2000
"""The kernel would wait ever longer between its tries, so that a healed network would go unnoticed."""

REFUSED_SECONDS = 2.0
"""How long who was refused waits before it tries again: its key may have been added meanwhile."""

RECONNECT_SECONDS = 1.0
"""Who has another scheduler gives up one to which the connection has been lost for so long."""

# Plain integers: pyzmq's enumerations cost more than the calls that they are for. For the same reason a
# socket is asked whether it has something; that it has nothing would be an exception.
_NOBLOCK = int(zmq.NOBLOCK)
_NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_RCVMORE = int(zmq.RCVMORE)
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_CONNECTION_EVENTS = int(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
_REFUSALS: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the scheduler does not know this process's key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "one side of the link has keys and the other has none or others",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "the scheduler ended the handshake: it may have another key",
}
NO_KEYS = "the scheduler wants keys, and this process has none: --link-keys"
_REFUSAL_EVENTS = int(sum(_REFUSALS))


class OutboxFullError(Exception):
    """The peer takes nothing and its outbox has reached its bound."""


class PeerUnreachableError(Exception):
    """No connection to that peer exists."""


class Outbox:
    """Messages that wait for a peer. Invariant: `size_bytes` is their sum, at most the bound."""

    def __init__(self, limit_bytes: int = OUTBOX_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._messages: deque[bytes] = deque()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._messages)

    def append(self, message: bytes) -> None:
        """Keep `message` for later. Raises `OutboxFullError` and keeps nothing when over the bound."""
        if self.size_bytes + len(message) > self._limit_bytes:
            raise OutboxFullError(f"{self.size_bytes} bytes wait for a peer that takes none")
        self._messages.append(message)
        self.size_bytes += len(message)

    def first(self) -> bytes:
        """The oldest message."""
        return self._messages[0]

    def pop(self) -> None:
        """Forget the oldest message: it was sent."""
        self.size_bytes -= len(self._messages.popleft())


def random_identity(prefix: bytes) -> bytes:
    """A routing id that no other process start has or will have."""
    return prefix + secrets.token_hex(8).encode()


class DealerLink:
    """A connection to one scheduler. Owns its socket until `close`.

    What is sent while the connection is down leaves when it is back, up to a high-water mark; epochs, leases
    and attempts make it harmless then. ZMQ_IMMEDIATE would refuse it, but with that option libzmq (4.3.5)
    drops what was received and not yet read when a connection ends, and aborts the process when that was
    the middle of a message. A link that is `watched` tells whether the connection is lost.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        identity: bytes,
        watched: bool = False,
        keys: ClientKeys | None = None,
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        _bound(self.socket)
        if keys is not None:
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            self.socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            self.socket.setsockopt(zmq.CURVE_SERVERKEY, keys.scheduler)
        self.socket.setsockopt(zmq.ROUTING_ID, identity)
        self.socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MILLISECONDS)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_LONGEST_MILLISECONDS)
        self.socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MILLISECONDS)
        self._monitor = self.socket.get_monitor_socket(_REFUSAL_EVENTS | (_CONNECTION_EVENTS * watched))
        self._address, self._watched = address, watched
        self._refusal, self._has_keys = "", keys is not None
        self._refused_at: float | None = None
        self.socket.connect(address)
        self._outbox = Outbox()
        self._lost_at: float | None = None
        self.is_up = False
        """Whether there is a connection, as far as `seconds_lost` has shown."""

    def seconds_lost(self, now: float) -> float:
        """How long the connection has been lost: 0 while there is one, and before the first.

        To be called often where the link is `watched`, or the news fill up their queue, and not otherwise.
        `now` is in seconds on a clock that never goes back; the count begins with the call that notices.
        """
        assert self._watched, "the link is not watched"
        self._take_news(now)
        return 0.0 if self._lost_at is None else now - self._lost_at

    def refusal(self, now: float) -> str:
        """Why the scheduler did not let this process in, if it was refused since the last call; else nothing.

        To be asked of every link each second or so, whether or not anything is sent by it. After a while it
        tries again, which libzmq does not do by itself where the key is unknown. Where the scheduler has
        another key it does, 20 times a second, and news that nobody takes fill a queue of 2000, at which
        libzmq's thread stops for all sockets of the process.
        """
        self._take_news(now)
        refusal, self._refusal = self._refusal, ""
        return refusal

    def _take_news(self, now: float) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"]
            if event in _REFUSALS:
                self._refusal = _REFUSALS[event] if self._has_keys else NO_KEYS
                self._refused_at = now
                continue
            self.is_up = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if self.is_up:
                self._lost_at = None
            elif self._lost_at is None:
                self._lost_at = now
        if self._refused_at is not None and now - self._refused_at >= REFUSED_SECONDS:
            self._refused_at = None
            with contextlib.suppress(zmq.ZMQError):  # libzmq has given the connection up already
                self.socket.disconnect(self._address)
            self.socket.connect(self._address)

    def send(self, message: bytes) -> None:
        """Send now, or later in order. Raises `OutboxFullError`."""
        if self.flush():
            try:
                self.socket.send(message, _NOBLOCK)
                return
            except zmq.Again:
                pass  # the peer is full or not there yet: the outbox keeps it
        self._outbox.append(message)

    def flush(self) -> bool:
        """Send what waits; True when nothing waits any more."""
        while len(self._outbox):
            try:
                self.socket.send(self._outbox.first(), _NOBLOCK)
            except zmq.Again:
                return False
            self._outbox.pop()
        return True

    def clear(self) -> None:
        """Forget what waits: it was for a peer that is gone."""
        while len(self._outbox):
            self._outbox.pop()

    def receive(self) -> bytes | None:
        """The next message, or None when there is none now."""
        if not _has_message(self.socket):
            return None
        return _whole(self.socket, self.socket.recv(_NOBLOCK))

    def close(self, linger_milliseconds: int = LINGER_MILLISECONDS) -> None:
        """Give queued messages a short while to leave, then close. Once more does nothing."""
        if self.socket.closed:
            return
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=linger_milliseconds)


class RouterLink:
    """The binding side of many connections. Owns its socket and one outbox a peer until `close`.

    With a `keeper`, which is the context's, peers must know its public key, and it must let them into the
    `domain`. Raises zmq.ZMQError when the address cannot be bound.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        keeper: LinkAuthenticator | None = None,
        domain: str = "",
    ) -> None:
        self.socket = context.socket(zmq.ROUTER)
        _bound(self.socket)
        self._context, self._keeper, self._domain = context, keeper, domain
        self._back_door = f"inproc://{secrets.token_hex(8)}"
        self._keys: dict[bytes, str] = {}
        self._revoked: list[bytes] = []
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if keeper is not None:
            self._allowed = keeper.allowed(domain)
            self.socket.setsockopt(zmq.CURVE_SERVER, 1)
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, keeper.secret)
            self.socket.setsockopt_string(zmq.ZAP_DOMAIN, domain)
            self.socket.bind(self._back_door)
        try:
            self.socket.bind(address)
        except zmq.ZMQError:
            self.socket.close(linger=0)  # or the context could never end
            raise
        self._monitor = self.socket.get_monitor_socket(_REFUSAL_EVENTS)
        self._outboxes: dict[bytes, Outbox] = {}

    @property
    def address(self) -> str:
        """Where it is bound, with the port that was chosen for a wildcard."""
        return self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def take_refused(self) -> int:
        """How many connections were refused since the last call: for keys that are missing or not known."""
        refused = 0
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor, zmq.NOBLOCK)
            refused += 1
        return refused

    def send(self, peer: bytes, message: bytes) -> None:
        """Send now, or later in order. Raises `PeerUnreachableError` or `OutboxFullError`."""
        if peer not in self._outboxes and self._try_send(peer, message):
            return
        self._outboxes.setdefault(peer, Outbox()).append(message)

    def flush(self) -> list[bytes]:
        """Send what waits; returns the peers that turned out to be gone."""
        gone = []
        for peer, outbox in list(self._outboxes.items()):
            try:
                while len(outbox) and self._try_send(peer, outbox.first()):
                    outbox.pop()
            except PeerUnreachableError:
                gone.append(peer)
            if peer in gone or not len(outbox):
                self._outboxes.pop(peer, None)
        return gone

    @property
    def has_waiting(self) -> bool:
        """Whether some outbox holds messages."""
        return bool(self._outboxes)

    def forget(self, peer: bytes) -> None:
        """Drop the outbox of a peer that is gone."""
        self._outboxes.pop(peer, None)
        self._keys.pop(peer, None)

    def receive(self) -> tuple[bytes, bytes] | None:
        """Who sent the next message, and that message; None when there is none now."""
        while _has_message(self.socket):
            peer = self.socket.recv(_NOBLOCK)
            # All of a message is here when its first frame is.
            if self._keeper is None:
                return peer, _whole(self.socket, self.socket.recv(_NOBLOCK))
            frame = self.socket.recv(_NOBLOCK, copy=False)
            message = _whole(self.socket, frame.bytes)
            # Asked of every message: another connection may have taken the peer's routing id over.
            key = str(frame.get("User-Id"))
            if key in self._keeper.allowed(self._domain):
                self._keys[peer] = key
                return peer, message
            if not peer.startswith(b"\0"):  # an id by libzmq: the rest of what one said who is cut off
                self._cut(peer)
        return None

    def take_revoked(self) -> list[bytes]:
        """Peers that were cut off since the last call, because their keys were taken away.

        To be called often. What such a peer sent and nobody has read is dropped, it is sent nothing any more,
        and when it connects again it is refused. Its connection ends when heartbeats stop, at its next word.
        """
        if self._keeper is not None and self._allowed is not self._keeper.allowed(self._domain):
            self._allowed = self._keeper.allowed(self._domain)
            for peer in [peer for peer, key in self._keys.items() if key not in self._allowed]:
                self._cut(peer)
        revoked, self._revoked = self._revoked, []
        return revoked

    def _cut(self, peer: bytes) -> None:
        """End a connection, for which libzmq has no call: one from inside takes its routing id over."""
        successor = self._context.socket(zmq.DEALER)
        successor.setsockopt(zmq.ROUTING_ID, peer)
        successor.connect(self._back_door)
        self.socket.getsockopt(_EVENTS)  # here the successor is taken in
        successor.close(linger=0)
        self.forget(peer)
        self._revoked.append(peer)

    def close(self, linger_milliseconds: int = LINGER_MILLISECONDS) -> None:
        """Give queued messages a short while to leave, then close. Once more does nothing."""
        if self.socket.closed:
            return
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=linger_milliseconds)

    def _try_send(self, peer: bytes, message: bytes) -> bool:
        try:
            self.socket.send(peer, _NOBLOCK_MORE)
            self.socket.send(message, _NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerUnreachableError(peer.hex()) from error
            raise
        return True


def _bound(socket: zmq.Socket[bytes]) -> None:
    """Limits and heartbeats that every socket has."""
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.LINGER, LINGER_MILLISECONDS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MILLISECONDS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MILLISECONDS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MILLISECONDS)


def _has_message(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(_EVENTS)) & _POLLIN)


def _whole(socket: zmq.Socket[bytes], first: bytes) -> bytes:
    """The message that begins with `first`; an empty one when more frames follow, which are dropped."""
    if not socket.getsockopt(_RCVMORE):
        return first
    while socket.getsockopt(_RCVMORE):
        socket.recv(_NOBLOCK)
    return b""
