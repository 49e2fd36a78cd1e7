"""One bound socket of the scheduler: messages in, messages out, and what may go wrong on either way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import structlog
import zmq

from sfllm.link_auth import LinkAuthenticator
from sfllm.messages import Message
from sfllm.sockets import OutboxFullError, PeerUnreachableError, RouterLink
from sfllm.wire import Array, Decoded, VersionError, WireError, decoder, encode, version_notice

log = structlog.get_logger()

LOG_INTERVAL_SECONDS = 1.0


class Link:
    """Decodes what arrives and encodes what leaves. A malformed message is counted, logged and dropped."""

    def __init__(
        self,
        name: str,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        kinds: Iterable[type[Message]],
        count_malformed: Callable[[str], None],
        keeper: LinkAuthenticator | None = None,
    ) -> None:
        self.name = name
        self._router = RouterLink(context, address, keeper, domain=name)
        self._decode = decoder(kinds)
        self._count_malformed = count_malformed
        self._next_log = self._next_refusal_log = 0.0
        self._unsaid_refusals = 0
        self._unlogged = 0

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For polling."""
        return self._router.socket

    @property
    def address(self) -> str:
        """Where it is bound."""
        return self._router.address

    @property
    def has_waiting(self) -> bool:
        """Whether messages wait for a slow peer."""
        return self._router.has_waiting

    def receive(self, most: int, now: float) -> Iterator[tuple[bytes, Decoded]]:
        """Up to `most` messages that are here now, each with the routing id of its sender."""
        for _ in range(most):
            received = self._router.receive()
            if received is None:
                return
            peer, frame = received
            try:
                decoded = self._decode(frame)
            except WireError as error:
                if isinstance(error, VersionError):
                    self._tell_version(peer)
                self._log_malformed(peer, error, now)
                self._count_malformed(self.name)
            else:
                yield peer, decoded

    def _tell_version(self, peer: bytes) -> None:
        """Let a peer of another version know why nothing comes back, so that it can say so itself."""
        try:
            self._router.send(peer, version_notice())
        except (PeerUnreachableError, OutboxFullError):
            self._router.forget(peer)

    def take_refused(self, now: float) -> int:
        """How many connections were refused since the last call, for keys that are missing or not known."""
        refused = self._router.take_refused()
        self._unsaid_refusals += refused
        if self._unsaid_refusals and now >= self._next_refusal_log:  # a stranger tries 20 times a second
            log.warning("connections refused for their keys", link=self.name, count=self._unsaid_refusals)
            self._unsaid_refusals, self._next_refusal_log = 0, now + LOG_INTERVAL_SECONDS
        return refused

    def take_revoked(self) -> list[bytes]:
        """Peers that were cut off since the last call, because their keys were taken away."""
        revoked = self._router.take_revoked()
        for peer in revoked:
            log.warning(
                "cut off: its key was taken away", link=self.name, peer=peer.decode("ascii", "replace")
            )
        return revoked

    def _log_malformed(self, peer: bytes, error: WireError, now: float) -> None:
        """Say what a peer should not have sent, unless something was said a moment ago."""
        if now < self._next_log:
            self._unlogged += 1
            return
        log.warning(
            "malformed message",
            link=self.name,
            peer=peer.decode("ascii", "replace"),
            error=str(error),
            unlogged=self._unlogged,
        )
        self._next_log = now + LOG_INTERVAL_SECONDS
        self._unlogged = 0

    def send(self, peer: bytes, message: Message, arrays: Iterable[Array] = ()) -> bool:
        """Send now or soon; False when the peer is gone, or so slow that it counts as gone."""
        try:
            self._router.send(peer, encode(message, *arrays))
        except (PeerUnreachableError, OutboxFullError) as error:
            log.debug("cannot send", link=self.name, peer=peer.decode("ascii", "replace"), error=str(error))
            self._router.forget(peer)
            return False
        return True

    def flush(self) -> list[bytes]:
        """Send what waits; returns peers that turned out to be gone."""
        return self._router.flush()

    def forget(self, peer: bytes) -> None:
        """Drop what waits for a peer."""
        self._router.forget(peer)

    def close(self) -> None:
        """Free the address."""
        self._router.close()
