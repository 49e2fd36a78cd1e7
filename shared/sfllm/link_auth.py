"""Who may connect to the scheduler: the answers to ZeroMQ's authentication protocol (ZAP, RFC 27)."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import structlog
import zmq
from zmq.auth.thread import ThreadAuthenticator

from sfllm.link_keys import LinkKeysError, SchedulerKeys, read_scheduler_keys

log = structlog.get_logger()

LOOK_SECONDS = 1.0
"""How often the owner looks whether the file has changed; a handshake looks at once."""


class LinkAuthenticator:
    """Lets peers in by their public keys, in a thread of its own, from construction until `close`.

    There is one for a context, whose sockets name their domain: gateways' keys open the domains `gateway` and
    `asset`, workers' keys `worker` and `asset`. The file is read again when it has changed, so that keys
    come and go without a restart; one that cannot be read then changes nothing. To end the connections of
    keys that have gone is the sockets' part (`RouterLink.take_revoked`). Raises `LinkKeysError`.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], file: str) -> None:
        self._file = Path(file)
        self._stamp: tuple[int, int, int] | None = _stamp(self._file)
        keys = read_scheduler_keys(self._file)
        self.secret, self.public = keys.secret, keys.public
        self._lock = threading.Lock()
        self._next_look = 0.0
        self._allowed = _allowed(keys)
        self._thread = ThreadAuthenticator(context)
        self._thread.start()
        for domain in self._allowed:
            self._thread.configure_curve_callback(domain=domain, credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a peer with this public key, in Z85, may come in. The thread asks at each handshake."""
        self._read_again()
        return key.decode() in self.allowed(domain)

    def allowed(self, domain: str) -> frozenset[str]:
        """The public keys that may come in, in Z85: another object whenever the file was read again."""
        return self._allowed.get(domain, frozenset())

    def look(self, now: float) -> None:
        """Read the file again if it has changed: to be called often, it looks once in `LOOK_SECONDS`."""
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._read_again()

    def close(self) -> None:
        """End the thread. Before the context ends, which would wait for it."""
        self._thread.stop()

    def _read_again(self) -> None:
        with self._lock:
            stamp = _stamp(self._file)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                self._allowed = _allowed(read_scheduler_keys(self._file))
                log.info("link keys read again", file=str(self._file))
            except LinkKeysError as error:
                log.error("link keys stay as they were", error=str(error))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What changes with the file's content; None when there is no such file."""
    try:
        status = os.stat(file)  # noqa: PTH116 - of what a link points to, as Kubernetes has it
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _allowed(keys: SchedulerKeys) -> dict[str, frozenset[str]]:
    gateways, workers = (
        frozenset(key.decode() for key in peers.values()) for peers in (keys.gateways, keys.workers)
    )
    return {"gateway": gateways, "worker": workers, "asset": gateways | workers}
