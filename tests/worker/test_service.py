"""A real worker process with a tiny model, driven by a test that plays the scheduler."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import zmq

from sfllm import wire
from sfllm.asset_pull import AssetPull
from sfllm.messages import (
    ALL_CHOICES,
    ASSETS,
    WORKER_TO_SCHEDULER,
    AssetOffer,
    Grant,
    GrantedRequest,
    Message,
    Sampling,
    SchedulerBeat,
    WorkerBeat,
    WorkerBye,
    WorkerCancel,
    WorkerDraining,
    WorkerFault,
    WorkerFinished,
    WorkerHello,
    WorkerTokens,
    WorkerWelcome,
)
from sfllm.sockets import RouterLink
from sfllm.token_batch import rows
from sfllm.wire import Array, as_array

Kind = TypeVar("Kind", bound=Message)

TIMEOUT_SECONDS = 30
GATEWAY = b"g-test"


class Scheduler:
    """Both router sockets, and the worker process that connects to them."""

    def __init__(self, directory: Path) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.workers = RouterLink(self.context, f"ipc://{directory}/workers")
        self.assets = RouterLink(self.context, f"ipc://{directory}/assets")
        self.decode = wire.decoder(WORKER_TO_SCHEDULER)
        command = [sys.executable, "-m", "sfllm_worker", "--model=tiny-llama", "--load-format=dummy"]
        command += ["--dtype=float32", "--threads=1", "--max-running-tokens=2048", "--served-model-name=tiny"]
        command += [
            f"--worker-address=ipc://{directory}/workers",
            f"--asset-address=ipc://{directory}/assets",
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.peer = b""

    def receive(self) -> tuple[Message, tuple[Array, ...]]:
        assert self.workers.socket.poll(TIMEOUT_SECONDS * 1000), "the worker is silent"
        received = self.workers.receive()
        assert received is not None
        self.peer = received[0]
        return self.decode(received[1])

    def expect(self, kind: type[Kind]) -> tuple[Kind, tuple[Array, ...]]:
        """The next message of this kind; beats and hellos in between are passed over."""
        while True:
            message, arrays = self.receive()
            if isinstance(message, kind):
                return message, arrays
            assert isinstance(message, WorkerBeat | WorkerHello), f"unexpected {message}"

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
        self.send(Grant(lease, (GrantedRequest(**request),)), as_array("I", prompt), as_array("I", []))

    def run_to_finish(self) -> tuple[list[int], WorkerFinished]:
        """Token ids of the one running choice, checked to come in order, and its end."""
        ids: list[int] = []
        while True:
            message, arrays = self.receive()
            if isinstance(message, WorkerTokens):
                assert message.gateway == GATEWAY
                for row in rows(arrays):
                    assert row.start == len(ids)
                    ids += row.ids.tolist()
            elif isinstance(message, WorkerFinished):
                return ids, message
            else:
                assert isinstance(message, WorkerBeat)

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
        self.process.communicate(timeout=TIMEOUT_SECONDS)
        self.workers.close()
        self.assets.close()
        self.context.term()


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Scheduler]:
    peer = Scheduler(tmp_path)
    yield peer
    peer.close()


def test_a_granted_request_is_generated_in_order_and_finished(scheduler: Scheduler) -> None:
    hello = scheduler.welcome()
    assert hello.card.name == "tiny"
    assert hello.capacity.kv_tokens == 2048
    scheduler.grant()
    ids, end = scheduler.run_to_finish()
    assert len(ids) == 5
    assert (end.finished.reason, end.finished.generated_tokens, end.finished.prompt_tokens) == (
        "length",
        5,
        3,
    )
    assert end.finished.timings.queue_seconds >= 0.25
    scheduler.grant(handle=2)
    assert scheduler.run_to_finish()[0] == ids, "same seed, same text"


def test_the_tokenizer_can_be_pulled_chunk_by_chunk(scheduler: Scheduler) -> None:
    hello = scheduler.welcome()
    decode = wire.decoder(ASSETS)
    assert scheduler.assets.socket.poll(TIMEOUT_SECONDS * 1000)
    peer, frames = scheduler.assets.receive() or (b"", [])
    assert decode(frames).message == AssetOffer(hello.card.assets)
    pull = AssetPull(next(asset for asset in hello.card.assets if asset.name == "tokenizer.json"))
    content = None
    while content is None:
        scheduler.assets.send(peer, wire.encode(pull.request()))
        assert scheduler.assets.socket.poll(TIMEOUT_SECONDS * 1000)
        content = pull.add(decode((scheduler.assets.receive() or (b"", []))[1]).message)
    assert len(content) == pull.asset.size_bytes


def test_a_cancel_frees_the_request_and_its_blocks(scheduler: Scheduler) -> None:
    hello = scheduler.welcome()
    scheduler.grant(sampling=Sampling(max_tokens=400, seed=1, ignore_eos=True))
    scheduler.expect(WorkerTokens)
    scheduler.send(WorkerCancel(1, GATEWAY, 1, 0, ALL_CHOICES))
    while True:
        message, _ = scheduler.receive()
        if isinstance(message, WorkerBeat) and message.running == 0:
            break
        assert not isinstance(message, WorkerFinished)
    assert message.free_kv_tokens == hello.capacity.kv_tokens


def test_choices_of_a_request_finish_one_by_one(scheduler: Scheduler) -> None:
    scheduler.welcome()
    scheduler.grant(choices=(0, 1, 2), generated_counts=(0, 0, 0))
    texts: dict[int, list[int]] = {}
    ended: set[int] = set()
    while len(ended) < 3:
        message, arrays = scheduler.receive()
        if isinstance(message, WorkerTokens):
            for row in rows(arrays):
                texts.setdefault(row.choice, []).extend(row.ids)
        elif isinstance(message, WorkerFinished):
            ended.add(message.finished.choice)
    assert {choice: len(ids) for choice, ids in texts.items()} == {0: 5, 1: 5, 2: 5}
    assert scheduler.wait_until_idle().waiting == 0


def test_a_request_that_cannot_run_here_is_a_fault_and_not_a_crash(scheduler: Scheduler) -> None:
    scheduler.welcome()
    for handle, prompt in ((1, (10**9,)), (2, (1,) * 4000)):
        scheduler.grant(handle=handle, prompt=prompt)
        fault, _ = scheduler.expect(WorkerFault)
        assert (fault.handle, fault.code) == (handle, "invalid_request")
    scheduler.grant(handle=3)
    assert len(scheduler.run_to_finish()[0]) == 5


def test_malformed_frames_are_survived(scheduler: Scheduler) -> None:
    scheduler.welcome()
    scheduler.workers.send(scheduler.peer, [b"", b"garbage"])
    scheduler.workers.send(scheduler.peer, [b"SF\x01\x3d", b"\xc1", b"", b""])
    scheduler.grant()
    assert len(scheduler.run_to_finish()[0]) == 5


def test_work_of_an_earlier_lease_is_dropped_when_the_scheduler_was_restarted(scheduler: Scheduler) -> None:
    scheduler.welcome(epoch=1)
    scheduler.grant(sampling=Sampling(max_tokens=400, seed=1, ignore_eos=True))
    scheduler.expect(WorkerTokens)
    scheduler.send(SchedulerBeat(2))
    while not isinstance(scheduler.receive()[0], WorkerHello):
        pass
    scheduler.send(WorkerWelcome(2, 7, 0.1, 30.0))
    beat = scheduler.wait_until_idle()
    assert beat.lease == 7
    scheduler.grant(handle=9, lease=1)
    scheduler.grant(handle=8, lease=7)
    assert scheduler.run_to_finish()[1].finished.handle == 8, "a grant of the old lease is ignored"


def test_a_scheduler_that_falls_silent_ends_the_lease(scheduler: Scheduler) -> None:
    scheduler.welcome(lease_seconds=0.5)
    started = time.monotonic()
    while not isinstance(scheduler.receive()[0], WorkerHello):
        pass
    assert time.monotonic() - started >= 0.4


def test_sigterm_lets_running_requests_finish_and_exits_with_zero(scheduler: Scheduler) -> None:
    scheduler.welcome()
    scheduler.grant(sampling=Sampling(max_tokens=300, seed=1, ignore_eos=True))
    scheduler.expect(WorkerTokens)
    scheduler.process.send_signal(signal.SIGTERM)
    kinds = []
    while WorkerBye not in kinds:
        kinds.append(type(scheduler.receive()[0]))
    assert WorkerDraining in kinds
    assert kinds.index(WorkerFinished) < kinds.index(WorkerBye)
    assert scheduler.process.wait(TIMEOUT_SECONDS) == 0


def test_help_answers_without_loading_a_model() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sfllm_worker", "--help"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0
    assert "SFLLM_MAX_RUNNING_TOKENS" in done.stdout


def test_a_model_that_is_not_there_is_a_readable_error() -> None:
    command = [sys.executable, "-m", "sfllm_worker", "--model", "/nowhere/model"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no model at '/nowhere/model'" in done.stderr
    assert "Traceback" not in done.stderr
