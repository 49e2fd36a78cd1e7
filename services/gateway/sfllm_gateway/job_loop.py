"""The side of a helper process: jobs from the standard input, results to the standard output."""

from __future__ import annotations

import resource
import struct
import sys
from collections.abc import Callable

LENGTH = struct.Struct("<I")
"""Goes before each job and each result."""

MEMORY_BYTES = 2**30


def serve_jobs(answer: Callable[[bytes], bytes]) -> None:
    """Answer jobs until the standard input ends, in bounded memory. `answer` must not raise."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jobs, results = sys.stdin.buffer, sys.stdout.buffer
    while len(head := jobs.read(LENGTH.size)) == LENGTH.size:
        (size,) = LENGTH.unpack(head)
        body = jobs.read(size)
        if len(body) < size:
            return
        result = answer(body)
        results.write(LENGTH.pack(len(result)) + result)
        results.flush()
