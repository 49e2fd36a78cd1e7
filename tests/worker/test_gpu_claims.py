"""Workers that all see every GPU take one each: real processes, real locks, a made-up `nvidia-smi`."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_nvidia_smi import listing, uuid_of, write_listing, write_tool

from sfllm.settings import WorkerSettings
from sfllm_worker.gpu_claims import claim_file, claim_gpu

A, B, C = GPUS = tuple(uuid_of(letter) for letter in "abc")

CLAIM = """
import os, sys
from sfllm import logs
from sfllm.settings import WorkerSettings
from sfllm_worker.gpu_claims import claim_gpu
logs.setup("worker")
print(claim_gpu(WorkerSettings(gpu_claims=sys.argv[1]), os.environ), flush=True)
{then}
sys.stdin.read()
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python processes, which end with the test."""
    with ExitStack() as stack:

        def run(*arguments: str, environ: dict[str, str], **variables: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **environ, **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    return tmp_path / "claims"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return write_listing(tmp_path, listing(GPUS))


def worker(claims: Path, *flags: str) -> tuple[str, ...]:
    """The arguments of a worker whose scheduler never comes."""
    return (
        *("-m", "sfllm_worker", "--mock", "--log-format=json", f"--gpu-claims={claims}"),
        *(f"--worker-address=ipc://{claims}-w", f"--asset-address=ipc://{claims}-a", *flags),
    )


def read_event(process: subprocess.Popen[str], *wanted: str) -> dict[str, Any]:
    """The next of the log's events that has one of these names."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        event: dict[str, Any] = msgspec.json.decode(line) if line.startswith("{") else {}
        if event.get("event") in wanted:
            return event
    raise AssertionError(f"ended without {wanted}:\n{''.join(said)}")


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_each_of_four_workers_takes_a_gpu_of_three_and_the_last_one_waits_for_a_death(
    start: Start, claims: Path, environ: dict[str, str]
) -> None:
    workers = [start(*worker(claims), environ=environ) for _ in range(4)]
    events = [read_event(process, "GPU claimed", "every GPU is claimed, waiting") for process in workers]
    [waiting] = [number for number, event in enumerate(events) if "gpu" not in event]
    owners = {event["gpu"]: workers[number] for number, event in enumerate(events) if "gpu" in event}
    assert set(owners) == set(GPUS)
    # Who had only just claimed may not have left a word yet.
    holders = events[waiting]["holders"]
    assert set(holders) == set(GPUS)
    assert all(f"pid {owners[uuid].pid} on " in said or "started" in said for uuid, said in holders.items())
    owners[B].send_signal(signal.SIGKILL)
    assert read_event(workers[waiting], "GPU claimed")["gpu"] == B
    assert f"pid {workers[waiting].pid} on " in claim_file(claims, B).read_text()
    assert read_event(workers[waiting], "worker ready")


def test_a_wait_in_vain_ends_with_who_has_what(start: Start, claims: Path, environ: dict[str, str]) -> None:
    holder = start("-c", CLAIM.format(then=""), str(claims), environ=environ, CUDA_VISIBLE_DEVICES=B)
    assert first_line(holder) == B
    process = start(*worker(claims, "--gpu-claim-seconds=0"), environ=environ, CUDA_VISIBLE_DEVICES="GPU-bb")
    _, said = process.communicate(timeout=60)
    assert process.returncode == os.EX_TEMPFAIL
    assert f"{B} by pid {holder.pid} on " in said
    assert "--gpu-claim-seconds" in said


def test_a_gpu_that_the_user_names_is_the_one_that_is_claimed(
    start: Start, claims: Path, environ: dict[str, str]
) -> None:
    process = start(*worker(claims), environ=environ, CUDA_VISIBLE_DEVICES="2")
    assert read_event(process, "GPU claimed")["gpu"] == C


def test_cuda_is_shown_the_claimed_gpu_before_torch_is_imported(
    start: Start, claims: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "torch.py").write_text(
        "import os\nprint(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\nos._exit(0)\n"
    )
    command = [argument for argument in worker(claims) if argument != "--mock"]
    process = start(*command, environ=environ, PYTHONPATH=str(modules), CUDA_VISIBLE_DEVICES=f"{C},{A}")
    assert first_line(process) == C


@pytest.mark.parametrize(
    "child",
    [
        "import subprocess; print(subprocess.Popen(['sleep', '60'], close_fds=False).pid, flush=True)",
        "if not os.fork(): print(os.getpid(), flush=True); __import__('time').sleep(60)",
    ],
    ids=["another program", "a fork"],
)
def test_a_child_of_a_killed_worker_does_not_keep_its_gpu(
    start: Start, claims: Path, environ: dict[str, str], child: str
) -> None:
    process = start("-c", CLAIM.format(then=child), str(claims), environ=environ)
    assert first_line(process) == A
    orphan = int(first_line(process))
    try:
        with claim_file(claims, A).open() as file:
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            process.kill()
            process.wait()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.kill(orphan, 0)  # it is still there
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_each_part_of_a_gpu_is_claimed_by_itself(start: Start, claims: Path, tmp_path: Path) -> None:
    parts = ("MIG-11111111-2222-3333-4444-555555555555", f"MIG-{B}/7/0")
    lines = "".join(f"  MIG 1g.10gb Device {number}: (UUID: {part})\n" for number, part in enumerate(parts))
    environ = write_listing(tmp_path, listing([A]) + lines)
    processes = [start("-c", CLAIM.format(then=""), str(claims), environ=environ) for _ in parts]
    assert {first_line(process) for process in processes} == set(parts)


@pytest.mark.parametrize(("device", "folder"), [("cpu", "claims"), ("cuda", ""), ("auto", None)])
def test_nothing_is_claimed_on_a_cpu_or_without_a_folder(
    device: Any, folder: str | None, tmp_path: Path, environ: dict[str, str]
) -> None:
    before = dict(environ)
    settings = WorkerSettings(device=device, gpu_claims=folder and str(tmp_path / folder))
    assert claim_gpu(settings, environ) is None
    assert environ == before
    assert not (tmp_path / "claims").exists()


@pytest.mark.parametrize("visible", [{}, {"CUDA_VISIBLE_DEVICES": "7"}])
def test_without_a_gpu_to_claim_auto_uses_none_and_cuda_is_refused(
    visible: dict[str, str], claims: Path, tmp_path: Path, environ: dict[str, str]
) -> None:
    given = {**environ, **visible} if visible else {"PATH": str(tmp_path / "empty")}
    with pytest.raises(ValueError, match="there is no GPU to claim"):
        claim_gpu(WorkerSettings(device="cuda", gpu_claims=str(claims)), given)
    assert claim_gpu(WorkerSettings(gpu_claims=str(claims)), given) is None
    assert given["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("wrong", ["folder", "driver"])
def test_a_folder_or_driver_that_cannot_be_used_is_a_clear_error(
    wrong: str, start: Start, claims: Path, tmp_path: Path, environ: dict[str, str]
) -> None:
    if wrong == "folder":
        claims.write_text("a file")
    else:
        environ = write_tool(tmp_path, "echo 'no driver'; exit 9")
    process = start(*worker(claims), environ=environ)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert ("--gpu-claims" if wrong == "folder" else "nvidia-smi failed: no driver") in said
