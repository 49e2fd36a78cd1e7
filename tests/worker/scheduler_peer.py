"""A real worker process, and a test that plays its scheduler."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import zmq

from sfllm import wire
from sfllm.messages import (
    WORKER_TO_SCHEDULER,
    Grant,
    GrantedRequest,
    Message,
    Sampling,
    WorkerBeat,
    WorkerFinished,
    WorkerHello,
    WorkerProgress,
    WorkerTokens,
    WorkerWelcome,
)
from sfllm.sockets import RouterLink
from sfllm.token_batch import rows
from sfllm.wire import Array, as_array

Kind = TypeVar("Kind", bound=Message)

TIMEOUT_SECONDS = 30
GATEWAY = b"g-test"

COMMON = ("--max-running-tokens=2048", "--served-model-name=tiny")
TINY = ("--model=tiny-llama", "--load-format=dummy", "--dtype=float32", "--threads=1", *COMMON)
MOCK = ("--mock", "--max-context-length=2048", "--mock-tokens-per-second=200", *COMMON)


class SchedulerPeer:
    """Both router sockets, and the worker process that connects to them."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.workers = RouterLink(self.context, f"ipc://{directory}/workers")
        self.assets = RouterLink(self.context, f"ipc://{directory}/assets")
        self.decode = wire.decoder(WORKER_TO_SCHEDULER)
        command = [sys.executable, "-m", "sfllm_worker", *flags]
        command += [
            f"--worker-address=ipc://{directory}/workers",
            f"--asset-address=ipc://{directory}/assets",
        ]
        self.log = directory / "worker.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log)
        self.peer = b""

    def receive(self) -> tuple[Message, tuple[Array, ...]]:
        heard = self.workers.socket.poll(TIMEOUT_SECONDS * 1000)
        assert heard, f"the worker is silent: {self.log.read_text()}"
        received = self.workers.receive()
        assert received is not None
        self.peer = received[0]
        return self.decode(received[1])

    def expect(self, kind: type[Kind]) -> tuple[Kind, tuple[Array, ...]]:
        """The next message of this kind; beats, hellos and progress of prefill in between are passed over."""
        while True:
            message, arrays = self.receive()
            if isinstance(message, kind):
                return message, arrays
            assert isinstance(message, WorkerBeat | WorkerHello | WorkerProgress), f"unexpected {message}"

    def welcome(self, epoch: int = 1, lease: int = 1, lease_seconds: float = 30.0) -> WorkerHello:
        hello, _ = self.expect(WorkerHello)
        self.send(WorkerWelcome(epoch, lease, 0.1, lease_seconds))
        return hello

    def grant(
        self, handle: int = 1, lease: int = 1, prompt: tuple[int, ...] = (5, 6, 7), **fields: object
    ) -> None:
        request = {
            "gateway": GATEWAY,
            "request_id": f"req-{handle}",
            "handle": handle,
            "attempt": 0,
            "choices": (0,),
            "prompt_count": len(prompt),
            "generated_counts": (0,),
            "sampling": Sampling(max_tokens=5, seed=3, ignore_eos=True),
            "queue_seconds": 0.25,
            **fields,
        }
        self.send(
            Grant(lease, (GrantedRequest(**request),)),
            as_array("I", prompt),
            as_array("I", []),
            as_array("Q", []),
        )

    def run_to_finish(self) -> tuple[list[int], WorkerFinished]:
        """Token ids of the one running choice, checked to come in order, and its end."""
        ids: list[int] = []
        while True:
            message, arrays = self.receive()
            if isinstance(message, WorkerTokens):
                assert message.gateway == GATEWAY
                for row in rows(arrays):
                    assert row.start == len(ids)
                    ids += row.ids
            elif isinstance(message, WorkerFinished):
                return ids, message
            else:
                assert isinstance(message, WorkerBeat | WorkerProgress)

    def wait_until_idle(self) -> WorkerBeat:
        while True:
            beat, _ = self.expect(WorkerBeat)
            if not beat.running and not beat.waiting:
                return beat

    def send(self, message: Message, *arrays: Array) -> None:
        self.workers.send(self.peer, wire.encode(message, *arrays))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT_SECONDS)
        self.workers.close()
        self.assets.close()
        self.context.term()


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
