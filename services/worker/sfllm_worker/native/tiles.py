"""Whether matrix tiles (AMX) can be trusted on this machine: tried once, in a process of their own.

Not every virtual machine that shows the instructions keeps their state, and a kernel may forbid them; a
worker must neither crash on that nor answer wrongly.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch

from sfllm_worker.native import structures as s
from sfllm_worker.native.build import cpu_flags
from sfllm_worker.native.library import check, open_library
from sfllm_worker.native.panels import PanelLinear

_log = logging.getLogger(__name__)

VARIABLE = "SFLLM_MATRIX_TILES"
"""Set to 0, it keeps the kernels from using matrix tiles."""
_TIMEOUT_SECONDS = 120.0


def has_tiles() -> bool:
    """Whether the CPU multiplies bfloat16 on matrix tiles, and nobody has switched that off."""
    return {"amx_tile", "amx_bf16"} <= set(cpu_flags().split()) and os.environ.get(VARIABLE) != "0"


def tiles_work(library: Path) -> bool:
    """Whether products of the library at that path, which was built for tiles, are right.

    The answer is kept beside the library.
    """
    answer = library.with_suffix(".tiles")
    with contextlib.suppress(FileNotFoundError):
        return answer.read_text(encoding="utf-8") == "right"
    try:
        command = [sys.executable, "-m", __name__, str(library)]
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        _log.warning("matrix tiles (AMX) did not answer in %.0f s and are left alone", _TIMEOUT_SECONDS)
        return False
    right = done.returncode == 0
    if not right:
        _log.warning("matrix tiles (AMX) do not work here and are left alone: exit code %d", done.returncode)
    answer.write_text("right" if right else "wrong", encoding="utf-8")
    return right


def products_are_right(library: ctypes.CDLL) -> bool:
    """Whether the library multiplies on tiles, and its products are those of torch."""
    if not library.sfllm_uses_tiles(s.BFLOAT16):
        return False
    # Whole numbers this small are exact in any order.
    weight = torch.arange(75 * 96).remainder(11).view(75, 96).to(torch.bfloat16)
    packed = PanelLinear(weight, None, len(weight))
    for tokens in (1, 16, 37):
        x = torch.arange(tokens * 96).remainder(7).view(tokens, 96).to(torch.bfloat16)
        result = torch.zeros(tokens, len(weight))
        arguments = (x.data_ptr(), tokens, len(weight), result.data_ptr(), 1)
        check(library.sfllm_linear(s.BFLOAT16, ctypes.byref(packed.matrix()), *arguments))
        if not torch.equal(result, x.float() @ weight.float().T):
            return False
    return True


if __name__ == "__main__":
    sys.exit(0 if products_are_right(open_library(Path(sys.argv[1]))) else 1)
