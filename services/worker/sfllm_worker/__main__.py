"""`python -m sfllm_worker`: one worker process."""

from __future__ import annotations

import os
import signal
import sys

from sfllm import logs
from sfllm.config import parse
from sfllm.model_files import ModelFilesError
from sfllm.settings import GatewaySettings, SchedulerSettings, WorkerSettings

SPINS_AT_A_BARRIER = "2000"
"""Threads that sleep at once make a decode step nearly twice as long; threads that spin without a
bound, while another process has a core, make it ten times as long. docs/performance.md has the figures."""


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
    _bound_spinning()
    # Imported after the arguments are checked, because torch takes a second: --help should not.
    from sfllm_worker.load import ModelLoadError  # noqa: PLC0415 - see above
    from sfllm_worker.startup import start  # noqa: PLC0415 - see above

    try:
        worker = start(settings)
    except (ModelLoadError, ModelFilesError, ValueError, OSError) as error:
        print(f"sfllm_worker: {error}", file=sys.stderr)
        return 2  # as for a wrong flag: starting again would not help
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: worker.service.drain())
    worker.service.run()
    if worker.admin is not None:
        worker.admin.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
