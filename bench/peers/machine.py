"""Measures what this machine's cores reach: `python -m bench.peers.machine` prints it as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

from bench.peers.roofline import Machine

SIZE = 3072
VALUES = 2**28  # 512 MiB of bfloat16 are in no cache
ATTEMPTS = 7


def measured() -> Machine:
    """The machine, measured in a process of its own so that its threads are gone afterwards."""
    command = (sys.executable, "-m", "bench.peers.machine")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Machine(**json.loads(done.stdout))


def _measure() -> Machine:
    import torch  # noqa: PLC0415 # only in the process that measures

    a, b = (torch.randn(SIZE, SIZE).to(torch.bfloat16) for _ in range(2))
    operations = 2 * SIZE**3 / min(_seconds(lambda: torch.mm(a, b)) for _ in range(ATTEMPTS))
    values = torch.ones(VALUES // 2, dtype=torch.float32)
    read = values.nbytes / min(_seconds(values.sum) for _ in range(ATTEMPTS))
    return Machine(read_bytes=read, operations=operations)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps(_measure()._asdict()))
