"""Proves the worker on a GPU: every kernel, whole models, graphs, overlap, the stack, failover.

What results are compared with is what the tests compare with: their folders are put on the search path.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

for _folder in ("bench", "tests/kernels", "tests/model", "tests/stack", "tests/worker"):
    if str(ROOT / _folder) not in sys.path:
        sys.path.append(str(ROOT / _folder))
