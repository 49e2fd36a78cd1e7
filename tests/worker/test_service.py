"""A real worker process, driven by a test that plays the scheduler."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scheduler_peer import GATEWAY, MOCK, TIMEOUT_SECONDS, TINY, SchedulerPeer

from sfllm import wire
from sfllm.asset_pull import AssetPull
from sfllm.messages import (
    ALL_CHOICES,
    ASSETS,
    AssetOffer,
    Drain,
    Sampling,
    WorkerBeat,
    WorkerCancel,
    WorkerFault,
    WorkerFinished,
    WorkerTokens,
)
from sfllm.token_batch import rows
from sfllm_worker.mock.tokens import mock_text


@pytest.fixture(params=[TINY, MOCK], ids=["model", "mock"])
def either(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SchedulerPeer]:
    """A worker with a tiny model, and one without."""
    peer = SchedulerPeer(tmp_path, *request.param)
    yield peer
    peer.close()


@pytest.fixture
def mock(tmp_path: Path) -> Iterator[SchedulerPeer]:
    """A worker that makes tokens up: quick to start, and otherwise the same process."""
    peer = SchedulerPeer(tmp_path, *MOCK)
    yield peer
    peer.close()


def test_a_granted_request_is_generated_in_order_and_finished(either: SchedulerPeer) -> None:
    hello = either.welcome()
    assert hello.card.name == "tiny"
    assert hello.capacity.kv_tokens == 2048
    either.grant()
    ids, end = either.run_to_finish()
    finished = end.finished
    assert len(ids) == 5
    assert (finished.reason, finished.generated_tokens, finished.prompt_tokens) == ("length", 5, 3)
    assert finished.timings.queue_seconds >= 0.25
    either.grant(handle=2)
    assert either.run_to_finish()[0] == ids, "same seed, same text"


def test_a_cancel_frees_the_request_and_its_blocks(either: SchedulerPeer) -> None:
    hello = either.welcome()
    either.grant(sampling=Sampling(max_tokens=400, seed=1, ignore_eos=True))
    either.expect(WorkerTokens)
    either.send(WorkerCancel(1, GATEWAY, 1, 0, ALL_CHOICES))
    while True:
        message, _ = either.receive()
        if isinstance(message, WorkerBeat) and message.running == 0:
            break
        assert not isinstance(message, WorkerFinished)
    assert message.free_kv_tokens == hello.capacity.kv_tokens
    assert message.digest == 0


def test_choices_of_a_request_finish_one_by_one(either: SchedulerPeer) -> None:
    either.welcome()
    either.grant(choices=(0, 1, 2), generated_counts=(0, 0, 0))
    texts: dict[int, list[int]] = {}
    ended: set[int] = set()
    while len(ended) < 3:
        message, arrays = either.receive()
        if isinstance(message, WorkerTokens):
            for row in rows(arrays):
                texts.setdefault(row.choice, []).extend(row.ids)
        elif isinstance(message, WorkerFinished):
            ended.add(message.finished.choice)
    assert {choice: len(ids) for choice, ids in texts.items()} == {0: 5, 1: 5, 2: 5}
    assert either.wait_until_idle().waiting == 0


def test_a_mock_worker_says_what_anybody_can_compute(mock: SchedulerPeer) -> None:
    mock.welcome()
    mock.grant(prompt=(70, 71, 72), sampling=Sampling(max_tokens=30, seed=11))
    ids, _ = mock.run_to_finish()
    assert bytes(ids).decode() == mock_text(11, 0, [70, 71, 72], 30)


def test_the_tokenizer_can_be_pulled_chunk_by_chunk(mock: SchedulerPeer) -> None:
    hello = mock.welcome()
    decode = wire.decoder(ASSETS)
    assert mock.assets.socket.poll(TIMEOUT_SECONDS * 1000)
    peer, frame = mock.assets.receive() or (b"", b"")
    assert decode(frame).message == AssetOffer(hello.card.assets)
    pull = AssetPull(next(asset for asset in hello.card.assets if asset.name == "tokenizer.json"))
    content = None
    while content is None:
        mock.assets.send(peer, wire.encode(pull.request()))
        assert mock.assets.socket.poll(TIMEOUT_SECONDS * 1000)
        content = pull.add(decode((mock.assets.receive() or (b"", []))[1]).message)
    assert len(content) == pull.asset.size_bytes


def test_a_request_that_cannot_run_here_is_a_fault_and_not_a_crash(mock: SchedulerPeer) -> None:
    mock.welcome()
    for handle, prompt in ((1, (10**9,)), (2, (1,) * 4000)):
        mock.grant(handle=handle, prompt=prompt)
        fault, _ = mock.expect(WorkerFault)
        assert (fault.handle, fault.code) == (handle, "invalid_request")
    mock.grant(handle=3)
    assert len(mock.run_to_finish()[0]) == 5


def test_malformed_messages_are_survived(mock: SchedulerPeer) -> None:
    mock.welcome()
    mock.workers.send(mock.peer, b"")
    mock.workers.send(mock.peer, b"garbage")
    mock.workers.send(mock.peer, wire.encode(Drain(1))[:-1])
    mock.grant()
    assert len(mock.run_to_finish()[0]) == 5


def test_a_mock_worker_needs_neither_torch_nor_numpy_nor_a_tokenizer_library() -> None:
    names = ("torch", "numpy", "tokenizers")
    code = (
        "import sys; import sfllm_worker.__main__, sfllm_worker.mock.startup;"
        f"print([name for name in {names} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert done.stdout.strip() == "[]"


def test_help_answers_without_loading_a_model() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sfllm_worker", "--help"],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0
    assert "SFLLM_MAX_RUNNING_TOKENS" in done.stdout


def test_a_model_that_is_not_there_is_a_readable_error() -> None:
    command = [sys.executable, "-m", "sfllm_worker", "--model", "/nowhere/model"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no model at '/nowhere/model'" in done.stderr
    assert "Traceback" not in done.stderr
