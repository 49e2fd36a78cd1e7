"""Who may connect to the scheduler: the answers to ZeroMQ's authentication protocol (ZAP, RFC 27)."""

from __future__ import annotations

import os
from pathlib import Path

import structlog
import zmq
from zmq.auth.thread import ThreadAuthenticator

from sfllm.link_keys import LinkKeysError, SchedulerKeys, read_scheduler_keys

log = structlog.get_logger()


class LinkAuthenticator:
    """Lets peers in by their public keys, in a thread of its own, from construction until `close`.

    There is one for a context, whose sockets name their domain: gateways' keys open the domains `gateway` and
    `asset`, workers' keys `worker` and `asset`. The file is read again when it has changed, so that keys
    come and go without a restart; one that cannot be read then changes nothing. Raises `LinkKeysError`.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], file: str) -> None:
        self._file = Path(file)
        self._stamp: tuple[int, int, int] | None = _stamp(self._file)
        keys = read_scheduler_keys(self._file)
        self.secret, self.public = keys.secret, keys.public
        self._allowed = _allowed(keys)
        self._thread = ThreadAuthenticator(context)
        self._thread.start()
        for domain in self._allowed:
            self._thread.configure_curve_callback(domain=domain, credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a peer with this public key, in Z85, may come in. The thread asks at each handshake."""
        self._read_again()
        return key in self._allowed.get(domain, frozenset())

    def close(self) -> None:
        """End the thread. Before the context ends, which would wait for it."""
        self._thread.stop()

    def _read_again(self) -> None:
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


def _allowed(keys: SchedulerKeys) -> dict[str, frozenset[bytes]]:
    gateways, workers = frozenset(keys.gateways.values()), frozenset(keys.workers.values())
    return {"gateway": gateways, "worker": workers, "asset": gateways | workers}
