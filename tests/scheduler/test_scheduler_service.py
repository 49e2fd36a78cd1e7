"""The scheduler process over real sockets: greeting, serving, losing peers, surviving nonsense."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from core_driver import card, finished
from scheduler_process import BEAT_SECONDS, LEASE_SECONDS, PATIENCE_SECONDS, Peer, SchedulerProcess

from sfllm.asset_pull import CHUNK_BYTES, AssetPull, asset_of, chunk_of
from sfllm.messages import (
    ALL_CHOICES,
    Admitted,
    AssetChunk,
    AssetGet,
    AssetOffer,
    Cancel,
    Capacity,
    Finished,
    GatewayBeat,
    GatewayHello,
    GatewayWelcome,
    Grant,
    Interrupted,
    ModelCard,
    Models,
    Rejected,
    Sampling,
    SchedulerBeat,
    Submit,
    Tokens,
    WorkerBeat,
    WorkerCancel,
    WorkerFinished,
    WorkerHello,
    WorkerTokens,
    WorkerWelcome,
)
from sfllm.token_batch import TokenBatch, rows
from sfllm.wire import as_array, encode, version_notice


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[SchedulerProcess]:
    process = SchedulerProcess(tmp_path)
    yield process
    process.close()


def join_gateway(scheduler: SchedulerProcess) -> tuple[Peer, GatewayWelcome]:
    gateway = scheduler.peer("gateway", b"g-")
    gateway.send(GatewayHello(1))
    return gateway, gateway.wait(GatewayWelcome)[0]


def join_worker(scheduler: SchedulerProcess, model: ModelCard | None = None) -> tuple[Peer, WorkerWelcome]:
    worker = scheduler.peer("worker", b"w-")
    worker.send(WorkerHello("W1", model or card(), Capacity(8, 4096, 512)))
    return worker, worker.wait(WorkerWelcome)[0]


def submit(gateway: Peer, handle: int = 1, attempt: int = 0) -> None:
    message = Submit(f"r{handle}", handle, attempt, "m", (0,), (0,), Sampling(8, 1), 0, 60_000)
    gateway.send(message, as_array("I", [1, 2, 3]), as_array("I", []), as_array("Q", []))


def test_peers_are_welcomed_with_the_epoch_and_the_intervals(scheduler: SchedulerProcess) -> None:
    _, welcome = join_gateway(scheduler)
    _, lease = join_worker(scheduler)
    assert (welcome.beat_seconds, welcome.lease_seconds) == (BEAT_SECONDS, LEASE_SECONDS)
    assert welcome.epoch == lease.epoch


def test_a_request_goes_to_the_worker_and_its_tokens_come_back(scheduler: SchedulerProcess) -> None:
    gateway, _ = join_gateway(scheduler)
    worker, welcome = join_worker(scheduler)
    submit(gateway, handle=7)
    assert gateway.wait(Admitted)[0] == Admitted(7, 0)
    grant, (prompts, generated, _) = worker.wait(Grant)
    assert (list(prompts), list(generated)) == ([1, 2, 3], [])
    (entry,) = grant.requests
    batch = TokenBatch()
    batch.append(7, 0, 0, 0, [11, 12])
    worker.send(WorkerTokens(welcome.lease, entry.gateway), *batch.arrays())
    worker.send(WorkerFinished(welcome.lease, entry.gateway, finished(entry)), as_array("f", []))
    _, arrays = gateway.wait(Tokens)
    assert [(row.handle, row.start, list(row.ids)) for row in rows(arrays)] == [(7, 0, [11, 12])]
    assert gateway.wait(Finished)[0].handle == 7
    assert scheduler.metric('request_queue_time_seconds_count{model_name="m"}') == 1
    scheduler.wait_for_metric('num_requests_running{model_name="m"}', 0)


def test_a_cancel_reaches_the_worker(scheduler: SchedulerProcess) -> None:
    gateway, _ = join_gateway(scheduler)
    worker, _ = join_worker(scheduler)
    submit(gateway)
    worker.wait(Grant)
    gateway.send(Cancel(1, 0, ALL_CHOICES, "client left"))
    cancel, _ = worker.wait(WorkerCancel)
    assert (cancel.gateway, cancel.handle, cancel.choice) == (gateway.identity, 1, ALL_CHOICES)


def test_a_gateway_gets_a_models_files_through_the_scheduler(scheduler: SchedulerProcess) -> None:
    content = bytes(range(256)) * (CHUNK_BYTES // 256) + b"and a bit more"
    small = b"{}"
    assets = (asset_of("tokenizer.json", content), asset_of("template", small))
    stored = {asset.sha256: data for asset, data in zip(assets, (content, small), strict=True)}
    gateway, _ = join_gateway(scheduler)
    assert gateway.wait(Models)[0].models == ()
    worker, _ = join_worker(scheduler, card(assets=assets))
    source = scheduler.peer("asset", b"w-", worker.identity)
    source.send(AssetOffer(assets))
    for _ in range(3):
        question, _ = source.wait(AssetGet)
        source.send(chunk_of(question.sha256, stored[question.sha256], question.offset))
    while not (models := gateway.wait(Models)[0].models):
        pass
    assert models[0].card.assets == assets
    files = scheduler.peer("asset", b"g-", gateway.identity)
    pull = AssetPull(assets[0])
    received = None
    while received is None:
        files.send(pull.request())
        received = pull.add(files.wait(AssetChunk)[0])
    assert received == content


def test_an_asset_that_is_not_here_is_answered_with_nothing(scheduler: SchedulerProcess) -> None:
    files = scheduler.peer("asset", b"g-")
    files.send(AssetGet("0" * 64, 0))
    assert files.wait(AssetChunk)[0] == AssetChunk("0" * 64, 0, 0, b"")


def test_malformed_messages_are_counted_and_change_nothing(scheduler: SchedulerProcess) -> None:
    gateway, _ = join_gateway(scheduler)
    beat = encode(GatewayBeat(1))
    nonsense = [b"", b"x", b"SG" + beat[2:], beat[:-1], beat[:-1] + b"\xc1", beat + b"more"]
    for frame in nonsense:
        gateway.send_bytes(frame)
    worker = scheduler.peer("worker", b"w-")
    worker.send_bytes(b"SF\x02\x03\x01\x00\x00\x00\x90")
    join_worker(scheduler)
    submit(gateway)
    gateway.wait(Admitted)
    scheduler.wait_for_metric('malformed_messages_total{link="gateway"}', len(nonsense))
    scheduler.wait_for_metric('malformed_messages_total{link="worker"}', 1)
    assert gateway.identity.decode() in scheduler.log_text()


@pytest.mark.parametrize("link", ["gateway", "worker", "asset"])
def test_a_peer_of_another_version_is_told_the_schedulers(scheduler: SchedulerProcess, link: str) -> None:
    peer = scheduler.peer(link, b"n-")
    peer.send_bytes(b"SF\x63\x01 of which only the beginning is known")
    assert peer.receive_bytes(time.monotonic() + PATIENCE_SECONDS) == version_notice()
    scheduler.wait_for_metric(f'malformed_messages_total{{link="{link}"}}', 1)
    assert "peer speaks protocol version 99" in scheduler.log_text()


def test_a_worker_that_falls_silent_has_its_requests_interrupted(scheduler: SchedulerProcess) -> None:
    gateway, _ = join_gateway(scheduler)
    worker, _ = join_worker(scheduler)
    submit(gateway)
    worker.wait(Grant)
    worker.close()
    while True:
        gateway.send(GatewayBeat(1))
        message, _ = gateway.receive(time.monotonic() + PATIENCE_SECONDS)
        if isinstance(message, Interrupted):
            break
    assert (message.handle, message.worker) == (1, "W1")
    assert message.cause in {"silent", "unreachable"}
    scheduler.wait_for_metric(f'request_migrations_total{{cause="{message.cause}"}}', 1)


def test_beats_keep_peers_known(scheduler: SchedulerProcess) -> None:
    gateway, _ = join_gateway(scheduler)
    worker, welcome = join_worker(scheduler)
    for _ in range(int(2 * LEASE_SECONDS / BEAT_SECONDS)):
        gateway.wait(SchedulerBeat)
        worker.wait(SchedulerBeat)
        gateway.send(GatewayBeat(1))
        worker.send(WorkerBeat(welcome.lease, 0, 0, 0, 4096), as_array("Q", []))
    submit(gateway)
    assert worker.wait(Grant)[0].requests[0].handle == 1


def test_time_passes_while_nothing_but_tokens_comes(scheduler: SchedulerProcess) -> None:
    gateway, _ = join_gateway(scheduler)
    worker, welcome = join_worker(scheduler)
    submit(gateway)
    grant, _ = worker.wait(Grant)
    gateway.wait(Admitted)
    beats = start = 0
    deadline = time.monotonic() + PATIENCE_SECONDS
    while beats < 2:
        assert time.monotonic() < deadline, "a scheduler that only relays never beats"
        batch = TokenBatch()
        batch.append(1, 0, 0, start, [11])
        worker.send(WorkerTokens(welcome.lease, grant.requests[0].gateway), *batch.arrays())
        start += 1
        while not isinstance(heard := gateway.receive(deadline)[0], Tokens):
            beats += isinstance(heard, SchedulerBeat)


def test_a_request_for_an_unknown_model_is_rejected(scheduler: SchedulerProcess) -> None:
    gateway, _ = join_gateway(scheduler)
    # For two leases after its start a scheduler waits for workers that it does not know yet.
    for handle in range(1, 500):
        submit(gateway, handle)
        message, _ = gateway.receive(time.monotonic() + PATIENCE_SECONDS)
        while not isinstance(message, Admitted | Rejected):
            message, _ = gateway.receive(time.monotonic() + PATIENCE_SECONDS)
        if isinstance(message, Rejected):
            break
        gateway.send(GatewayBeat(1))
        gateway.wait(SchedulerBeat)
    assert isinstance(message, Rejected)
    assert message.code == "model_not_found"


def test_a_restarted_scheduler_has_another_epoch_and_asks_for_everything_again(
    scheduler: SchedulerProcess,
) -> None:
    gateway, first = join_gateway(scheduler)
    join_worker(scheduler)
    submit(gateway)
    gateway.wait(Admitted)
    assert scheduler.stop() == 0
    scheduler.start()
    submit(gateway)
    welcome, _ = gateway.wait(GatewayWelcome)
    assert welcome.epoch != first.epoch
    gateway.send(GatewayHello(1))
    gateway.wait(GatewayWelcome)
    worker, _ = join_worker(scheduler)
    submit(gateway, attempt=1)
    assert worker.wait(Grant)[0].requests[0].attempt == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_with_exit_code_zero(scheduler: SchedulerProcess, number: int) -> None:
    join_gateway(scheduler)
    assert scheduler.stop(number) == 0
    assert "scheduler stops" in scheduler.log_text()


def test_it_ends_even_when_nobody_reads_its_log(scheduler: SchedulerProcess) -> None:
    scheduler.stop()
    scheduler.start(log=subprocess.PIPE)
    gateway, _ = join_gateway(scheduler)
    join_worker(scheduler)
    for handle in range(1000):  # each of them is a line; a pipe holds 64 KiB
        submit(gateway, handle=handle)
    gateway.wait_for_silence(LEASE_SECONDS)
    assert scheduler.stop() == -signal.SIGALRM


def test_its_health_is_told_over_http(scheduler: SchedulerProcess) -> None:
    join_gateway(scheduler)
    assert json.loads(scheduler.admin("/health"))["status"] == "healthy"


def test_a_taken_address_is_a_readable_error(scheduler: SchedulerProcess) -> None:
    join_gateway(scheduler)
    taken = f"tcp://127.0.0.1:{scheduler.admin_port}"
    command = [sys.executable, "-m", "sfllm_scheduler", f"--worker-address={taken}"]
    command += [f"--{link}-address={scheduler.address(f'other-{link}')}" for link in ("gateway", "asset")]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert outcome.returncode == 1
    assert "cannot bind" in outcome.stderr
    assert taken in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_help_lists_the_flags_with_their_defaults() -> None:
    command = [sys.executable, "-m", "sfllm_scheduler", "--help"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
    for flag in ("--policy", "--max-queue-requests", "--lease-seconds", "--gateway-address", "--admin-port"):
        assert flag in outcome.stdout
