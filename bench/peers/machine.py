"""Measures what this machine's cores reach: `python -m bench.peers.machine` prints it as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

from bench.peers.roofline import Machine

SIZE = 3072
READ_BYTES = 2**29  # far more than any cache holds
ATTEMPTS = 7


def measured() -> Machine:
    """The machine, measured in a process of its own so that its threads are gone afterwards."""
    command = (sys.executable, "-m", "bench.peers.machine")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Machine(**json.loads(done.stdout))


def _measure() -> Machine:
    import torch  # noqa: PLC0415 # only in the process that measures

    bf16 = [torch.randn(SIZE, SIZE).to(torch.bfloat16) for _ in range(2)]
    int8 = [torch.randint(-127, 127, (SIZE, SIZE), dtype=torch.int8) for _ in range(2)]
    values = torch.ones(READ_BYTES // 4, dtype=torch.float32)
    products = 2 * SIZE**3
    return Machine(
        read_bytes=READ_BYTES / _best(values.sum),
        operations=products / _best(lambda: torch.mm(*bf16)),
        int8_operations=products / _best(lambda: torch._int_mm(*int8)),
    )


def _best(work: Callable[[], object]) -> float:
    def seconds() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return min(seconds() for _ in range(ATTEMPTS))


if __name__ == "__main__":
    print(json.dumps(_measure()._asdict()))
