"""A real worker process with a tiny model, driven by a test that plays the scheduler."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scheduler_peer import GATEWAY, TIMEOUT_SECONDS, SchedulerPeer

from sfllm import wire
from sfllm.asset_pull import AssetPull
from sfllm.messages import (
    ALL_CHOICES,
    ASSETS,
    AssetOffer,
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
from sfllm.token_batch import rows

TINY = ("--model=tiny-llama", "--load-format=dummy", "--dtype=float32", "--threads=1")
TINY += ("--max-running-tokens=2048", "--served-model-name=tiny")


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[SchedulerPeer]:
    peer = SchedulerPeer(tmp_path, *TINY)
    yield peer
    peer.close()


def test_a_granted_request_is_generated_in_order_and_finished(scheduler: SchedulerPeer) -> None:
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


def test_the_tokenizer_can_be_pulled_chunk_by_chunk(scheduler: SchedulerPeer) -> None:
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


def test_a_cancel_frees_the_request_and_its_blocks(scheduler: SchedulerPeer) -> None:
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


def test_choices_of_a_request_finish_one_by_one(scheduler: SchedulerPeer) -> None:
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


def test_a_request_that_cannot_run_here_is_a_fault_and_not_a_crash(scheduler: SchedulerPeer) -> None:
    scheduler.welcome()
    for handle, prompt in ((1, (10**9,)), (2, (1,) * 4000)):
        scheduler.grant(handle=handle, prompt=prompt)
        fault, _ = scheduler.expect(WorkerFault)
        assert (fault.handle, fault.code) == (handle, "invalid_request")
    scheduler.grant(handle=3)
    assert len(scheduler.run_to_finish()[0]) == 5


def test_malformed_frames_are_survived(scheduler: SchedulerPeer) -> None:
    scheduler.welcome()
    scheduler.workers.send(scheduler.peer, [b"", b"garbage"])
    scheduler.workers.send(scheduler.peer, [b"SF\x01\x3d", b"\xc1", b"", b""])
    scheduler.grant()
    assert len(scheduler.run_to_finish()[0]) == 5


def test_work_of_an_earlier_lease_is_dropped_when_the_scheduler_was_restarted(
    scheduler: SchedulerPeer,
) -> None:
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


def test_a_scheduler_that_falls_silent_ends_the_lease(scheduler: SchedulerPeer) -> None:
    scheduler.welcome(lease_seconds=0.5)
    started = time.monotonic()
    while not isinstance(scheduler.receive()[0], WorkerHello):
        pass
    assert time.monotonic() - started >= 0.4


def test_sigterm_lets_running_requests_finish_and_exits_with_zero(scheduler: SchedulerPeer) -> None:
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
