"""How a real worker process ends, or does not: drained, broken, stuck, stopped, forgotten."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from scheduler_peer import GATEWAY, MOCK, TIMEOUT_SECONDS, TINY, SchedulerPeer, free_port

from sfllm.messages import (
    Message,
    Sampling,
    SchedulerBeat,
    WorkerBeat,
    WorkerBye,
    WorkerDraining,
    WorkerFinished,
    WorkerHello,
    WorkerReturned,
    WorkerTokens,
    WorkerUnknown,
    WorkerWelcome,
)

ENDLESS = Sampling(max_tokens=1500, seed=1, ignore_eos=True)
POISON = 66
POISONED = ("--mock-poison-token=66",)


@pytest.fixture
def peer(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SchedulerPeer]:
    """A mock worker with the flags that the test names."""
    running = SchedulerPeer(tmp_path, *MOCK, *getattr(request, "param", ()))
    yield running
    running.close()


def kinds_until(peer: SchedulerPeer, last: type[Message]) -> list[Message]:
    """All messages up to the first of that kind."""
    messages: list[Message] = []
    while not messages or not isinstance(messages[-1], last):
        messages.append(peer.receive()[0])
    return messages


@pytest.mark.parametrize("flags", [TINY, MOCK], ids=["model", "mock"])
def test_sigterm_lets_requests_finish_and_exits_with_zero(tmp_path: Path, flags: tuple[str, ...]) -> None:
    peer = SchedulerPeer(tmp_path, *flags)
    try:
        peer.welcome()
        peer.grant(sampling=Sampling(max_tokens=300, seed=1, ignore_eos=True))
        peer.expect(WorkerTokens)
        peer.process.send_signal(signal.SIGTERM)
        kinds = [type(message) for message in kinds_until(peer, WorkerBye)]
        assert WorkerDraining in kinds
        assert kinds.index(WorkerFinished) < kinds.index(WorkerBye)
        assert peer.process.wait(TIMEOUT_SECONDS) == 0
    finally:
        peer.close()


@pytest.mark.parametrize("peer", [("--max-batch-size=1",)], indirect=True)
def test_a_drain_gives_back_what_has_not_begun(peer: SchedulerPeer) -> None:
    peer.welcome()
    peer.grant(1, sampling=Sampling(max_tokens=200, seed=1))
    peer.grant(2)
    peer.expect(WorkerTokens)
    peer.process.send_signal(signal.SIGTERM)
    kinds_until(peer, WorkerDraining)
    peer.grant(3)
    messages = kinds_until(peer, WorkerBye)
    returned = [message for message in messages if isinstance(message, WorkerReturned)]
    assert returned == [WorkerReturned(1, GATEWAY, 2, 0), WorkerReturned(1, GATEWAY, 3, 0)]
    ends = [message.finished for message in messages if isinstance(message, WorkerFinished)]
    assert [(end.handle, end.generated_tokens) for end in ends] == [(1, 200)]
    assert peer.process.wait(TIMEOUT_SECONDS) == 0


@pytest.mark.parametrize("peer", [("--drain-seconds=1",)], indirect=True)
def test_a_drain_that_takes_too_long_ends_with_a_goodbye_and_zero(peer: SchedulerPeer) -> None:
    peer.welcome()
    peer.grant(sampling=ENDLESS)
    peer.expect(WorkerTokens)
    started = time.monotonic()
    peer.process.send_signal(signal.SIGTERM)
    messages = kinds_until(peer, WorkerBye)
    assert messages[-1] == WorkerBye(1)
    assert not any(isinstance(message, WorkerFinished) for message in messages)
    assert peer.process.wait(TIMEOUT_SECONDS) == 0
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize(
    "peer",
    [
        ("--drain-seconds=1", "--mock-tokens-per-second=0.001"),
        ("--drain-seconds=1", *POISONED, "--mock-poison=stall"),
    ],
    ids=["slow", "stuck"],
    indirect=True,
)
def test_a_drain_does_not_wait_for_a_step_that_takes_too_long(peer: SchedulerPeer) -> None:
    peer.welcome()
    peer.grant(prompt=(POISON,), sampling=ENDLESS)
    while not peer.expect(WorkerBeat)[0].digest:
        pass
    peer.process.send_signal(signal.SIGTERM)
    assert kinds_until(peer, WorkerBye)[-1] == WorkerBye(1)
    assert peer.process.wait(TIMEOUT_SECONDS) == 0


def test_a_second_signal_ends_a_drain_at_once(peer: SchedulerPeer) -> None:
    peer.welcome()
    peer.grant(sampling=ENDLESS)
    peer.expect(WorkerTokens)
    peer.process.send_signal(signal.SIGTERM)
    kinds_until(peer, WorkerDraining)
    peer.process.send_signal(signal.SIGINT)
    assert peer.process.wait(TIMEOUT_SECONDS) == -signal.SIGINT


def test_without_a_scheduler_a_signal_ends_the_worker_with_zero(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/nobody"
    command = [sys.executable, "-m", "sfllm_worker", *MOCK]
    command += [f"--worker-address={address}", f"--asset-address={address}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "worker ready" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_SECONDS) == 0


@pytest.mark.parametrize("peer", [(*POISONED, "--mock-poison=fail")], indirect=True)
def test_a_step_that_fails_is_told_and_logged_and_ends_the_worker_with_one(peer: SchedulerPeer) -> None:
    peer.welcome()
    peer.grant(1, sampling=ENDLESS)
    peer.expect(WorkerTokens)
    peer.grant(2, prompt=(65, POISON))
    bye = kinds_until(peer, WorkerBye)[-1]
    assert bye == WorkerBye(1, "RuntimeError: a poisoned prompt")
    assert peer.process.wait(TIMEOUT_SECONDS) == 1
    log = peer.log.read_text()
    assert "the worker failed" in log
    assert "Traceback" in log
    assert "_strike_if_poisoned" in log


@pytest.mark.parametrize("peer", [(*POISONED, "--mock-poison=crash")], indirect=True)
def test_a_crash_says_nothing(peer: SchedulerPeer) -> None:
    peer.welcome()
    peer.grant(2, prompt=(65, POISON))
    assert peer.process.wait(TIMEOUT_SECONDS) == 139


async def test_a_step_that_never_ends_is_ended_and_health_tells_of_it(tmp_path: Path) -> None:
    port = free_port()
    flags = (*POISONED, "--mock-poison=stall", "--step-timeout-seconds=5", f"--admin-port={port}")
    peer = SchedulerPeer(tmp_path, *MOCK, *flags)
    try:
        peer.welcome()
        peer.expect(WorkerBeat)
        async with aiohttp.ClientSession() as session:
            assert await _health(session, port) == (200, "")
            peer.grant(prompt=(65, POISON))
            status, reason = 200, ""
            while status == 200:
                status, reason = await _health(session, port)
        assert "the loop has not turned for" in reason
        assert peer.process.wait(TIMEOUT_SECONDS) == 1
    finally:
        peer.close()
    log = peer.log.read_text()
    assert "Timeout" in log
    assert "in _stall" in log, "the stuck thread's traceback"
    assert "in _run" in log, "and those of the others"


async def _health(session: aiohttp.ClientSession, port: int) -> tuple[int, str]:
    async with session.get(f"http://127.0.0.1:{port}/health") as response:
        return response.status, (await response.json()).get("reason", "")


@pytest.mark.parametrize("peer", [(*POISONED, "--mock-poison=stall")], indirect=True)
def test_a_step_that_hangs_still_beats_and_its_counter_stands_still(peer: SchedulerPeer) -> None:
    peer.welcome()
    peer.grant(prompt=(65, POISON))
    beats = [peer.expect(WorkerBeat)[0] for _ in range(8)]
    assert beats[-1].step == 0
    assert beats[-1].digest != 0


def stop(peer: SchedulerPeer) -> None:
    """Stop the process, and wait until it stands still."""
    peer.process.send_signal(signal.SIGSTOP)
    assert os.waitid(os.P_PID, peer.process.pid, os.WSTOPPED | os.WNOWAIT) is not None


def serves_again(peer: SchedulerPeer, lease: int, epoch: int) -> None:
    """Welcome it under a new lease: it holds nothing of the old one, and serves."""
    peer.send(WorkerWelcome(epoch, lease, 0.1, 30.0))
    beat = peer.wait_until_idle()
    assert (beat.lease, beat.digest, beat.free_kv_tokens) == (lease, 0, 2048)
    peer.grant(handle=9, lease=1)
    peer.grant(handle=8, lease=lease)
    ids, end = peer.run_to_finish()
    assert (len(ids), end.lease, end.finished.handle) == (5, lease, 8)


def test_a_worker_that_was_stopped_and_forgotten_joins_again_with_nothing(peer: SchedulerPeer) -> None:
    peer.welcome()
    peer.grant(choices=(0, 1), generated_counts=(0, 0), sampling=ENDLESS)
    peer.expect(WorkerTokens)
    stop(peer)
    peer.process.send_signal(signal.SIGCONT)
    messages = kinds_until(peer, WorkerBeat)
    assert {message.lease for message in messages} == {1}, "all that it says is known to be stale"
    peer.send(WorkerUnknown(2))
    messages = kinds_until(peer, WorkerHello)[:-1]
    assert {message.lease for message in messages} <= {1}
    serves_again(peer, lease=7, epoch=2)


def test_a_worker_that_is_resumed_after_its_lease_joins_again_with_nothing(peer: SchedulerPeer) -> None:
    peer.welcome(lease_seconds=1.0)
    peer.grant(sampling=ENDLESS)
    peer.expect(WorkerTokens)
    stop(peer)
    time.sleep(1.1)  # its lease runs out
    peer.process.send_signal(signal.SIGCONT)
    kinds_until(peer, WorkerHello)
    serves_again(peer, lease=2, epoch=1)


def test_work_of_an_earlier_lease_is_dropped_after_a_restart_of_the_scheduler(peer: SchedulerPeer) -> None:
    peer.welcome(epoch=1)
    peer.grant(sampling=ENDLESS)
    peer.expect(WorkerTokens)
    peer.send(SchedulerBeat(2))
    kinds_until(peer, WorkerHello)
    serves_again(peer, lease=7, epoch=2)


def test_a_scheduler_that_falls_silent_ends_the_lease(peer: SchedulerPeer) -> None:
    peer.welcome(lease_seconds=0.5)
    started = time.monotonic()
    kinds_until(peer, WorkerHello)
    assert time.monotonic() - started >= 0.4
