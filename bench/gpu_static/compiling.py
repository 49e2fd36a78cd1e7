"""Compiles one form to machine code and reads from the assembler's own words what it needs."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, NamedTuple

from bench.gpu_static.forms import Form, kernel_variants

if TYPE_CHECKING:
    from sfllm_worker.kernels.variant import Variant

THREADS_OF_A_WARP = 32


class Resources(NamedTuple):
    """What a compiled kernel takes of a processor."""

    registers: int
    """32-bit registers of a thread."""
    spilled: int
    """Bytes that a thread stores to and loads from local memory because registers ran out."""
    shared: int
    """Bytes of shared memory of a program, when it is launched."""


class CompileError(Exception):
    """A form did not compile, or the assembler did not say what it needs."""


_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def resources_in(log: str, shared: int) -> Resources:
    """Read `ptxas -v`'s words about one kernel. Raises `CompileError` when they are not there."""
    registers, spills = _REGISTERS.findall(log), _SPILLS.findall(log)
    if not registers or not spills:
        raise CompileError(f"the assembler's log names no registers or spills: {log.strip()!r}")
    spilled = sum(int(stored) + int(loaded) for stored, loaded in spills)
    return Resources(max(map(int, registers)), spilled, shared)


def compiled(variant: Variant, architecture: int) -> Resources:
    """Compile a variant as a launch on that architecture would. Raises `CompileError`.

    Triton must have been imported without its interpreter; nothing is read from or left in its cache.
    """
    import triton  # noqa: PLC0415 - only processes that compile need it
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    places = list(variant.signature)
    divisible = {(places.index(argument),): [["tt.divisibility", 16]] for argument in variant.aligned}
    source = ASTSource(variant.kernel, dict(variant.signature), dict(variant.constants), divisible)
    log = io.StringIO()
    target = GPUTarget("cuda", architecture, THREADS_OF_A_WARP)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    try:
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(source, target=target, options=options)
    except Exception as error:
        raise CompileError(f"{type(error).__name__}: {error}\n{log.getvalue()}"[:2000]) from error
    return resources_in(log.getvalue(), kernel.metadata.shared)


def compile_all(forms: Iterable[Form], jobs: int) -> Iterator[tuple[Form, Resources | str]]:
    """Compile forms in order: what each needs, or why it did not compile.

    With several jobs they are processes of their own. `prepare` must have been called.
    """
    if jobs == 1:
        yield from map(_compile, forms)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(_compile, forms)


def prepare(cache: str) -> None:
    """Make this process, and those that it starts, compile for real and say what the assembler said.

    Must be called before triton is imported. `cache` is a directory for what triton leaves behind.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}


_variants: dict[tuple[str, str], Variant] = {}


def _compile(form: Form) -> tuple[Form, Resources | str]:
    if not _variants:
        _variants.update(kernel_variants())
    try:
        return form, compiled(_variants[form.module, form.variant], form.architecture)
    except CompileError as error:
        return form, str(error)
