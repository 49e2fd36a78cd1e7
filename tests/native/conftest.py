"""The kernels, compiled for this machine and for poorer ones."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest
import torch

from sfllm_worker.native.build import BuildError, build, find_compiler
from sfllm_worker.native.library import open_library

ARCHITECTURES = ["native", "x86-64-v3", "x86-64"] if platform.machine() == "x86_64" else ["native"]


@pytest.fixture(scope="session", params=ARCHITECTURES)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library with all that this CPU has, with AVX2, and with what every x86-64 has."""
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    if request.param == "x86-64-v3" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2")
    torch.ones(2).sum()  # torch loads its OpenMP runtime when it is imported; this is that import's use
    return open_library(build(tmp_path_factory.mktemp("kernels"), request.param))
