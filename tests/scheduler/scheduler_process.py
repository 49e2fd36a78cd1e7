"""A real scheduler process on loopback, and fake gateways and workers with real sockets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TypeVar

import zmq

from sfllm.messages import ASSETS, SCHEDULER_TO_GATEWAY, SCHEDULER_TO_WORKER, Message
from sfllm.sockets import DealerLink, random_identity
from sfllm.wire import Array, Decoded, decoder, encode

M = TypeVar("M", bound=Message)

PATIENCE_SECONDS = 15.0
BEAT_SECONDS = 0.2
LEASE_SECONDS = 1.0


class Peer:
    """A DEALER that sends messages and waits for the one it wants, keeping what came before it."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        identity: bytes,
        kinds: Sequence[type[Message]],
    ) -> None:
        self.identity = identity
        self._link = DealerLink(context, address, identity)
        self._decode = decoder(kinds)

    def send(self, message: Message, *arrays: Array) -> None:
        self.send_bytes(encode(message, *arrays))

    def send_bytes(self, frame: bytes) -> None:
        self._link.send(frame)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._link.flush():
            assert time.monotonic() < deadline, "the scheduler takes no messages"
            self._link.socket.poll(10, zmq.POLLOUT)

    def wait(self, kind: type[M]) -> tuple[M, tuple[Array, ...]]:
        """The next message of that kind; others are passed over."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            message, arrays = self.receive(deadline)
            if isinstance(message, kind):
                return message, arrays
        raise AssertionError(f"no {kind.__name__} came")

    def receive(self, deadline: float) -> Decoded:
        return self._decode(self.receive_bytes(deadline))

    def receive_bytes(self, deadline: float) -> bytes:
        while (frame := self._link.receive()) is None:
            assert time.monotonic() < deadline, "nothing came"
            self._link.socket.poll(100)
        return frame

    def wait_for_silence(self, seconds: float) -> None:
        """Read until nothing has come for so long: not even beats."""
        while self._link.socket.poll(int(seconds * 1000)):
            while self._link.receive() is not None:
                pass

    def close(self) -> None:
        self._link.close()


class SchedulerProcess:
    """Owns the process, its addresses and the peers made for it."""

    def __init__(self, folder: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._folder = folder
        self._peers: list[Peer] = []
        self._log = (folder / "scheduler.log").open("ab")
        # A socket path must be short, which a test's own folder is not.
        self._sockets = tempfile.TemporaryDirectory(prefix="sfllm-")
        self.admin_port = _free_port()
        self.start()

    def address(self, link: str) -> str:
        return f"ipc://{self._sockets.name}/{link}"

    def start(self, *flags: str, log: int | IO[bytes] | None = None) -> None:
        """Start the process; its log goes to a file unless told otherwise."""
        links = [f"--{link}-address={self.address(link)}" for link in ("gateway", "worker", "asset")]
        timing = [f"--beat-seconds={BEAT_SECONDS}", f"--lease-seconds={LEASE_SECONDS}"]
        rest = [f"--admin-port={self.admin_port}", "--log-format=json", "--log-level=debug"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sfllm_scheduler", *links, *timing, *rest, *flags], stderr=log or self._log
        )

    def log_text(self) -> str:
        return (self._folder / "scheduler.log").read_text()

    def peer(self, link: str, prefix: bytes, identity: bytes | None = None) -> Peer:
        kinds = {"gateway": SCHEDULER_TO_GATEWAY, "worker": SCHEDULER_TO_WORKER, "asset": ASSETS}[link]
        peer = Peer(self._context, self.address(link), identity or random_identity(prefix), kinds)
        self._peers.append(peer)
        return peer

    def admin(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """The value of a metric with its labels as they are printed, or 0."""
        lines = [line.rpartition(" ") for line in self.admin("/metrics").splitlines()]
        return next((float(value) for key, _, value in lines if key == f"sfllm:{name}"), 0.0)

    def wait_for_metric(self, name: str, value: float) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (seen := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {seen}, not {value}"
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        return self.process.wait(timeout=PATIENCE_SECONDS)

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=PATIENCE_SECONDS)
        if self.process.stderr is not None:
            self.process.stderr.close()
        self._context.term()
        self._log.close()
        self._sockets.cleanup()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
