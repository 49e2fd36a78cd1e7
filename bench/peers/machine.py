"""Measures what this machine's cores reach: `python -m bench.peers.machine` prints it as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

from bench.peers.roofline import Machine

SIZES = (1024, 2048, 3072)  # of square matrices; where products are fastest depends on the caches
READ_BYTES = 2**31  # far more than any cache holds
ATTEMPTS = 10
PROCESSES = 3


def measured() -> Machine:
    """The most of several measurements, each in a process of its own so that its threads are gone afterwards.

    Whatever disturbs one makes the machine look slower than it is, and servers better than they are.
    """
    command = (sys.executable, "-m", "bench.peers.machine")
    texts = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(PROCESSES)
    ]
    found = [Machine(**json.loads(text)) for text in texts]
    return Machine(*(max(values) for values in zip(*found, strict=True)))


def _measure() -> Machine:
    import torch  # noqa: PLC0415 # only in the process that measures

    def fastest(product: Callable[[torch.Tensor, torch.Tensor], object], dtype: torch.dtype) -> float:
        def rate(size: int) -> float:
            a, b = (torch.randint(-8, 8, (size, size)).to(dtype) for _ in range(2))
            return 2 * size**3 / _best(lambda: product(a, b))

        return max(map(rate, SIZES))

    values = torch.ones(READ_BYTES // 4, dtype=torch.float32)
    return Machine(
        read_bytes=READ_BYTES / _best(values.sum),
        operations=fastest(torch.mm, torch.bfloat16),
        int8_operations=fastest(torch._int_mm, torch.int8),
    )


def _best(work: Callable[[], object]) -> float:
    def seconds() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return min(seconds() for _ in range(ATTEMPTS))


if __name__ == "__main__":
    print(json.dumps(_measure()._asdict()))
