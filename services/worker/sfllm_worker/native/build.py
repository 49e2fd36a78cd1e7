"""Compiles the C++ sources for this machine, once: later starts find the library in the cache directory.

A wheel cannot carry code for every kind of CPU, and a compiler takes seconds. The name of the result has a
hash of all that it depends on (sources, flags, compiler, CPU, OpenMP runtime), so a home directory that
several kinds of machines share, a new compiler or a new release never load what does not fit.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
# Nothing looks at errno or at floating point exceptions; the order of sums and NaN stay as written.
COMPILE_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
TIMEOUT_SECONDS = 120
_OPENMP_RUNTIME = re.compile(r"/lib(gomp|iomp5|omp)[^/]*\.so[^/]*$")


class BuildError(Exception):
    """The kernels cannot be compiled here; the text says why."""


def build(cache: Path, options: Sequence[str] = ("-march=native",)) -> Path:
    """The compiled library, from `cache` if it is there. Raises `BuildError` or OSError.

    `options` go to the compiler. Workers that start at the same time may each compile; the last rename
    wins, and all results are the same.
    """
    compiler, runtime = find_compiler(), openmp_runtime()
    flags = (*COMPILE_FLAGS, *options)
    target = cache / f"sfllm-{_key(compiler, runtime, flags)}.so"
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as scratch:
            objects, linked = Path(scratch, "library.o"), Path(scratch, "library.so")
            _run([compiler, *flags, "-c", str(SOURCES / "library.cpp"), "-o", str(objects)])
            # Not by -fopenmp, which would bring the compiler's own OpenMP runtime: a second pool of
            # threads beside torch's makes both many times slower.
            _run([compiler, "-shared", str(objects), str(runtime), "-o", str(linked)])
            linked.replace(target)
    return target


def find_compiler() -> str:
    """The C++ compiler: `CXX` if set, else g++. Raises `BuildError` when there is none."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise BuildError(f"no C++ compiler: {name} was not found")
    return found


def openmp_runtime() -> Path:
    """The OpenMP runtime that this process has loaded, which is torch's. Raises `BuildError`."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = line.split(maxsplit=5)[-1]
        if _OPENMP_RUNTIME.search(path):
            return Path(path)
    raise BuildError("torch has loaded no OpenMP runtime")


def _key(compiler: str, runtime: Path, flags: Sequence[str]) -> str:
    parts = [_run([compiler, "--version"]), platform.machine(), cpu_flags(), str(runtime), *flags]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def cpu_flags() -> str:
    """What the CPU can do, in the kernel's words; empty where the kernel has none."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return " ".join(sorted(value.split()))
    return ""


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or [error.stderr.strip()]
        raise BuildError(f"{Path(command[0]).name} failed: {lines[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{Path(command[0]).name} took longer than {TIMEOUT_SECONDS} s") from error
    return done.stdout
