"""`python -m sfllm_worker`: one worker process."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from sfllm import logs
from sfllm.config import parse
from sfllm.gpus import GpuListError
from sfllm.link_keys import read_client_keys
from sfllm.model_files import ModelFilesError
from sfllm.settings import GatewaySettings, SchedulerSettings, WorkerSettings
from sfllm_worker.assembly import Parts, Worker, assemble
from sfllm_worker.gpu_claims import NoFreeGpuError, claim_gpu

SPINS_AT_A_BARRIER = "2000"
"""Threads that sleep at once make a decode step nearly twice as long; threads that spin without a
bound, while another process has a core, make it ten times as long. docs/performance.md has the figures."""

LATE_SECONDS = 0.5
"""A step that outlasts a drain by so much is abandoned."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _bound_spinning() -> None:
    """Set how long OpenMP's threads spin, unless the user has. It is read when torch loads OpenMP."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS_AT_A_BARRIER)


def main() -> int:
    """Serve until SIGTERM or SIGINT; the exit code."""
    settings = parse(
        WorkerSettings,
        prog="sfllm_worker",
        description="Runs a model for the scheduler: continuous batching over a paged KV cache.",
        known=[GatewaySettings, SchedulerSettings],
    )
    logs.setup("worker", settings.log_level, settings.log_format)
    for number in SIGNALS:
        signal.signal(number, _stop_starting)
    try:
        keys = read_client_keys(settings.link_keys, "worker") if settings.link_keys else None
        # Before _build: what it imports may initialise CUDA, which then sees this GPU alone.
        gpu = claim_gpu(settings, os.environ)
        worker = assemble(settings, _build(settings), gpu, keys)
    except NoFreeGpuError as error:
        print(f"sfllm_worker: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL  # starting again may help
    except (GpuListError, ModelFilesError, ValueError, OSError) as error:
        print(f"sfllm_worker: {error}", file=sys.stderr)
        return 2  # as for a wrong flag: starting again would not help
    _drain_at_signal(worker, settings.drain_seconds)
    try:
        code = worker.service.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # drained: it must not go off while the interpreter ends
    if worker.tracer is not None:
        worker.tracer.close()
    if worker.admin is not None:
        worker.admin.close()
    return code


def _build(settings: WorkerSettings) -> Parts:
    """Imported only now: torch takes a second, which neither --help nor a mock should wait for."""
    if settings.mock:
        from sfllm_worker.mock.startup import build  # noqa: PLC0415 - see above
    else:
        _bound_spinning()
        from sfllm_worker.startup import build  # noqa: PLC0415 - see above
    return build(settings)


def _stop_starting(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)  # nothing is held yet


def _drain_at_signal(worker: Worker, drain_seconds: float) -> None:
    """The first signal drains, for so long. The second ends the process, even within a step that hangs."""

    def drain(_number: int, _frame: FrameType | None) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, drain_seconds + LATE_SECONDS)
        worker.service.drain()

    for number in SIGNALS:
        signal.signal(number, drain)
    signal.signal(signal.SIGALRM, lambda _number, _frame: worker.service.end_drain())


if __name__ == "__main__":
    sys.exit(main())
