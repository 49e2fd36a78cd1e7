"""The kernels, compiled for this machine and for poorer ones."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
from pathlib import Path

import pytest
import torch

from sfllm_worker.native.build import BuildError, build, find_compiler
from sfllm_worker.native.library import open_library

VARIANTS = {"native": ["-march=native"]}
if platform.machine() == "x86_64":
    VARIANTS |= {
        "avx2": ["-march=x86-64-v3"],
        "sse2": ["-march=x86-64"],
        "tiles": ["-march=native", "-DSFLLM_EMULATE_AMX"],
    }


@pytest.fixture(scope="session", params=VARIANTS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library with all that this CPU has, and as it comes out on others."""
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    if request.param == "avx2" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2")
    assert torch.get_num_threads()  # with torch comes the OpenMP runtime
    # Built once for all processes that share the tests: each build takes ten seconds.
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own) / f"kernels-{request.param}"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return open_library(build(shared, VARIANTS[request.param]))
