"""Threads that help one that leads: each task counts once, and nobody waits for a helper that was held up."""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import c_int64
from pathlib import Path

import pytest

from sfllm_worker.native.build import COMPILE_FLAGS, SOURCES, BuildError, find_compiler

ENTRY = Path(__file__).with_name("helpers_entry.cpp")


@pytest.fixture(scope="module")
def helpers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    target = tmp_path_factory.mktemp("helpers") / "entry.so"
    command = [
        compiler,
        *COMPILE_FLAGS,
        "-march=native",
        "-shared",
        f"-I{SOURCES}",
        str(ENTRY),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True, timeout=120)
    library = ctypes.CDLL(str(target))
    library.wrong_results.restype, library.wrong_results.argtypes = c_int64, [c_int64] * 3
    library.held_up_helper.restype = c_int64
    return library


@pytest.mark.parametrize(("threads", "tasks"), [(1, 7), (2, 1), (2, 3), (2, 100), (5, 40), (5, 5000)])
def test_each_task_counts_once_whoever_computes_it(helpers: ctypes.CDLL, threads: int, tasks: int) -> None:
    assert helpers.wrong_results(threads, tasks, 200) == 0


def test_a_helper_that_is_held_up_spoils_nothing_and_nobody_waits_for_it(helpers: ctypes.CDLL) -> None:
    assert helpers.held_up_helper() == 0
