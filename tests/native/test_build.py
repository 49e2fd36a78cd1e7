"""Compiling the kernels, finding them again, and doing without."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfllm_worker.load import load_model
from sfllm_worker.model.decoder import Decoder
from sfllm_worker.native import build as build_module
from sfllm_worker.native.build import BuildError, build
from sfllm_worker.native.choice import native_library
from sfllm_worker.native.decoder import NativeDecoder
from sfllm_worker.native.tiles import tiles_work

SCRIPT = """
import sys, torch
from pathlib import Path
from sfllm_worker.native.build import build
from sfllm_worker.native.library import open_library
open_library(build(Path(sys.argv[1])))
torch.ones(100, 100) @ torch.ones(100, 100)
names = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
print(sum("omp" in Path(name).name and ".so" in name for name in names))
"""


def processes(cache: Path, count: int) -> list[str]:
    """What so many processes print that open the library at the same time."""

    def one(_: int) -> str:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(cache)],
            capture_output=True,
            text=True,
            timeout=250,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return done.stdout.strip()

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    try:
        build_module.find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


def test_workers_that_start_together_share_one_library_and_each_has_one_openmp_runtime(
    tmp_path: Path,
) -> None:
    assert processes(tmp_path, 3) == ["1", "1", "1"]
    [made] = tmp_path.iterdir()
    written = made.stat().st_mtime_ns
    assert build(tmp_path) == made
    assert made.stat().st_mtime_ns == written


def test_another_kind_of_cpu_and_other_sources_get_a_library_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = build(tmp_path)
    monkeypatch.setattr(build_module, "cpu_flags", lambda: "fpu vme")
    other = build(tmp_path)
    assert own != other
    sources = tmp_path / "src"
    sources.mkdir()
    for source in build_module.SOURCES.iterdir():
        (sources / source.name).write_bytes(source.read_bytes() + b"\n// changed\n")
    monkeypatch.setattr(build_module, "SOURCES", sources)
    assert build(tmp_path) not in (own, other)


def test_a_compiler_that_fails_is_told_of_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "library.cpp").write_text("this is not C++")
    monkeypatch.setattr(build_module, "SOURCES", sources)
    with pytest.raises(BuildError, match="error"):
        build(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_without_a_compiler_the_model_runs_in_plain_torch_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SFLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            first = load_model("tiny-llama", dtype="float32", load_format="dummy").decoder
            second = load_model("tiny-llama", dtype="float32", load_format="dummy").decoder
    finally:
        native_library.cache_clear()
    assert type(first) is type(second) is Decoder
    [record] = caplog.records
    assert "no-such-compiler was not found" in record.getMessage()


@pytest.mark.parametrize(("dtype", "native"), [("float32", True), ("bfloat16", True), ("float16", False)])
def test_the_kernels_run_every_format_that_they_know(dtype: str, native: bool) -> None:
    decoder = load_model("tiny-llama", dtype=dtype, load_format="dummy").decoder
    assert isinstance(decoder, NativeDecoder) == native
    assert decoder.dtype == getattr(torch, dtype)


def test_matrix_tiles_are_tried_once_and_the_answer_is_kept(tmp_path: Path) -> None:
    library = build(tmp_path, ["-march=native", "-DSFLLM_EMULATE_AMX"])
    assert tiles_work(library)
    library.unlink()
    assert tiles_work(library)


def test_matrix_tiles_that_crash_or_are_not_there_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    for library in (broken, build(tmp_path, ["-march=x86-64"] if platform.machine() == "x86_64" else [])):
        assert not tiles_work(library)
        assert not tiles_work(library)
    assert len(caplog.records) == 2
