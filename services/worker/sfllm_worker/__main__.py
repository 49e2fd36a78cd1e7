"""`python -m sfllm_worker`: one worker process."""

from __future__ import annotations

import os
import signal
import sys

from sfllm import logs
from sfllm.config import parse
from sfllm.model_files import ModelFilesError
from sfllm.settings import GatewaySettings, SchedulerSettings, WorkerSettings


def main() -> int:
    """Serve until SIGTERM or SIGINT; the exit code."""
    settings = parse(
        WorkerSettings,
        prog="sfllm_worker",
        description="Runs a model for the scheduler: continuous batching over a paged KV cache.",
        known=[GatewaySettings, SchedulerSettings],
    )
    logs.setup("worker", settings.log_level, settings.log_format)
    # A thread that spins at a barrier while another process has its core turns a step of 20 ms into
    # one of seconds. OpenMP reads this when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
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
