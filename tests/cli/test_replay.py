"""A live scheduler's flight record, decided again by `sfllm replay`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from core_driver import card, finished
from scheduler_process import PATIENCE_SECONDS, Peer, SchedulerProcess

from sfllm.messages import (
    ALL_CHOICES,
    Admitted,
    Cancel,
    Capacity,
    GatewayBye,
    GatewayHello,
    GatewayWelcome,
    Grant,
    GrantedRequest,
    Interrupted,
    Sampling,
    SchedulerBeat,
    Submit,
    WorkerFinished,
    WorkerHello,
    WorkerTokens,
    WorkerWelcome,
)
from sfllm.prefixes import prefix_names
from sfllm.token_batch import TokenBatch
from sfllm.wire import as_array
from sfllm_cli.main import main
from sfllm_scheduler.core import admission
from sfllm_scheduler.core.flight import FlightRecord

SECRET_TOKEN = 0x5EC2E7


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[SchedulerProcess]:
    process = SchedulerProcess(tmp_path)
    process.stop()
    yield process
    process.close()


def start(scheduler: SchedulerProcess, record: Path, *flags: str) -> None:
    """Start it with hashes that no replay will have."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "1"
    try:
        scheduler.start(f"--record={record}", *flags)
    finally:
        if before is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = before


def replay(record: Path, *flags: str, hash_seed: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sfllm_cli", "replay", str(record), *flags],
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_SECONDS,
        check=False,
    )


def join(scheduler: SchedulerProcess, worker_id: str) -> tuple[Peer, int]:
    worker = scheduler.peer("worker", b"w-")
    worker.send(WorkerHello(worker_id, card(), Capacity(4, 2000, 512)))
    return worker, worker.wait(WorkerWelcome)[0].lease


def submit(gateway: Peer, handle: int, attempt: int = 0, suspects: int = 0) -> None:
    message = Submit(
        *(f"r{handle}", handle, attempt, "m", (0, 1), (0, 0), Sampling(8, 1), handle % 3, 60_000),
        cache_salt="a secret salt",
        tenant=f"tenant-{handle % 4}",
        suspects=suspects,
    )
    prompt = as_array("I", [SECRET_TOKEN] * (1 + handle * 37 % 300))
    gateway.send(message, prompt, as_array("I", []), prefix_names(prompt, "a secret salt"))


def serve(worker: Peer, lease: int, entry: GrantedRequest) -> None:
    batch = TokenBatch()
    for choice in entry.choices:
        batch.append(entry.handle, entry.attempt, choice, 0, [SECRET_TOKEN] * 8)
    worker.send(WorkerTokens(lease, entry.gateway), *batch.arrays())
    for choice in entry.choices:
        worker.send(WorkerFinished(lease, entry.gateway, finished(entry, choice)), as_array("f", []))


def load_with_faults(scheduler: SchedulerProcess) -> None:
    """Two gateways, three workers: one serves, one dies with what it has, one of the gateways leaves."""
    gateways = [scheduler.peer("gateway", b"g-") for _ in range(2)]
    for gateway in gateways:
        gateway.send(GatewayHello(1))
        gateway.wait(GatewayWelcome)
    doomed, _ = join(scheduler, "W1")
    for handle in range(40):
        submit(gateways[handle % 2], handle)
        submit(gateways[handle % 2], handle)  # a repeat
        gateways[handle % 2].wait(Admitted)
    doomed.wait(Grant)
    worker, lease = join(scheduler, "W2")
    gateways[0].send(Cancel(2, 0, ALL_CHOICES, "the client left"))
    gateways[0].send_bytes(b"nonsense")
    worker.send(
        WorkerTokens(lease, gateways[0].identity), as_array("Q", [1]), as_array("I", [1]), as_array("f", [])
    )
    doomed.close()
    served = 0
    while served < 12:
        grant, _ = worker.wait(Grant)
        for entry in grant.requests:
            serve(worker, lease, entry)
            served += 1
    lost = gateways[0].wait(Interrupted)[0]
    submit(gateways[0], lost.handle, lost.attempt + 1, lost.suspects)
    gateways[1].send(GatewayBye(1))
    gateways[0].wait(SchedulerBeat)


@pytest.mark.parametrize("policy", ["fcfs", "length", "prefix", "auto"])
def test_a_live_schedulers_decisions_are_made_again_byte_for_byte(
    scheduler: SchedulerProcess, tmp_path: Path, policy: str
) -> None:
    record = tmp_path / "flight"
    start(scheduler, record, f"--policy={policy}", "--tenant-weights=tenant-1=3")
    load_with_faults(scheduler)
    assert scheduler.stop() == 0
    outcome = replay(record)
    assert (outcome.returncode, outcome.stdout.splitlines()[-1]) == (0, "identical"), outcome.stdout
    for decision in ("Grant", "Admitted", "interrupted", "worker_lost", "gateway_lost", "malformed"):
        assert f" {decision}" in outcome.stdout
    assert SECRET_TOKEN.to_bytes(4, "little") * 3 not in uncompressed(record)
    assert b"secret salt" not in uncompressed(record)


def uncompressed(record: Path) -> bytes:
    entries = FlightRecord([record.read_bytes()]).entries()
    return b"".join(entry.content for entry in entries)


def test_a_killed_schedulers_record_has_everything_up_to_its_last_block(
    scheduler: SchedulerProcess, tmp_path: Path
) -> None:
    record = tmp_path / "flight"
    start(scheduler, record)
    gateway = scheduler.peer("gateway", b"g-")
    gateway.send(GatewayHello(1))
    gateway.wait(GatewayWelcome)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "GatewayWelcome" not in replay(record).stdout:
        assert time.monotonic() < deadline
    scheduler.stop(signal.SIGKILL)
    assert replay(record).returncode == 0
    whole = record.read_bytes()
    record.write_bytes(whole[:-3])
    outcome = replay(record)
    assert outcome.returncode == 0
    assert "in the middle of a block" in outcome.stdout


@pytest.fixture
def record(scheduler: SchedulerProcess, tmp_path: Path) -> Path:
    record = tmp_path / "flight"
    start(scheduler, record)
    gateway = scheduler.peer("gateway", b"g-")
    gateway.send(GatewayHello(1))
    gateway.wait(GatewayWelcome)
    join(scheduler, "W1")
    submit(gateway, 1)
    gateway.wait(Admitted)
    gateway.wait(SchedulerBeat)
    scheduler.stop()
    return record


def test_events_and_decisions_can_be_read(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(record), "--print"]) == 0
    printed = capsys.readouterr().out
    assert "from g-" in printed
    assert "Submit(request_id='r1'" in printed
    assert "Grant(lease=1" in printed


def test_another_policy_can_be_tried_on_the_same_events(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(record), "--policy", "fcfs"]) == 0
    printed = capsys.readouterr().out
    assert "not to be compared" in printed
    assert "identical" not in printed


def test_a_decision_that_differs_is_shown_from_both_sides(
    record: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def admitted_otherwise(handle: int, attempt: int) -> Admitted:
        return Admitted(handle, attempt + 1)

    monkeypatch.setattr(admission, "Admitted", admitted_otherwise)
    assert main(["replay", str(record)]) == 1
    printed = capsys.readouterr().out
    assert "differs, at" in printed
    assert "recorded: Admitted" in printed
    assert "Admitted(handle=1, attempt=1)" in printed


@pytest.mark.parametrize("damage", ["header", "block", "kind", "empty"])
def test_a_damaged_record_is_a_readable_error(
    record: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(record.read_bytes())
    match damage:
        case "header":
            content[30] ^= 0xFF
        case "block":
            content[-20] ^= 0xFF
        case "kind":
            content[0] ^= 0xFF
        case _:
            content.clear()
    record.write_bytes(content)
    assert main(["replay", str(record)]) == 1
    error = capsys.readouterr().err
    assert str(record) in error
    assert "Traceback" not in error


def test_a_record_ends_at_its_bound_and_says_so(scheduler: SchedulerProcess, tmp_path: Path) -> None:
    record = tmp_path / "flight"
    start(scheduler, record, "--record-max-bytes=65536", "--max-queue-requests=100000")
    gateway = scheduler.peer("gateway", b"g-")
    gateway.send(GatewayHello(1))
    gateway.wait(GatewayWelcome)
    deadline = time.monotonic() + 4 * PATIENCE_SECONDS
    handle = 0
    while "the record is full" not in scheduler.log_text():
        assert time.monotonic() < deadline
        for _ in range(100):
            handle += 1
            submit(gateway, handle)
        gateway.wait(Admitted)
    assert record.stat().st_size <= 65536
    gateway.wait(SchedulerBeat)  # it goes on
    outcome = replay(record)
    assert outcome.returncode == 0
    assert "reached its bound" in outcome.stdout


def test_the_record_of_an_earlier_run_is_kept(scheduler: SchedulerProcess, tmp_path: Path) -> None:
    record = tmp_path / "flight"
    record.write_text("an earlier run")
    start(scheduler, record)
    scheduler.peer("gateway", b"g-").send(GatewayHello(1))
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not record.exists() or "ready" not in scheduler.log_text():
        assert time.monotonic() < deadline
    scheduler.stop()
    assert (tmp_path / "flight.1").read_text() == "an earlier run"


def test_a_record_that_cannot_be_written_is_a_readable_error(
    scheduler: SchedulerProcess, tmp_path: Path
) -> None:
    start(scheduler, tmp_path / "missing" / "flight")
    assert scheduler.process.wait(timeout=PATIENCE_SECONDS) == 1
    assert "cannot record" in scheduler.log_text()
    assert "Traceback" not in scheduler.log_text()
