"""Loads the compiled kernels and says how they are called."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

from sfllm.model_files import cache_directory
from sfllm_worker.native import structures as s
from sfllm_worker.native.build import BuildError, build

_log = logging.getLogger(__name__)

THIS_CPU = ("-march=native",)
WITH_TILES = (*THIS_CPU, "-DSFLLM_TILES")
TILES_VARIABLE = "SFLLM_MATRIX_TILES"

_SIGNATURES = {
    "sfllm_decoder_step": (c_int, [POINTER(s.ModelSpec), POINTER(s.KVSpec), POINTER(s.StepSpec)]),
    "sfllm_tiles_from": (c_int64, [c_int64]),
    "sfllm_linear": (c_int, [c_int64, POINTER(s.Matrix), c_void_p, c_int64, c_void_p, c_int64]),
    "sfllm_attend": (c_int, [POINTER(s.AttentionSpec), POINTER(s.StepSpec)]),
    "sfllm_sample": (c_int, [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64]),
    "sfllm_norm": (None, [c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p]),
    "sfllm_gated": (None, [c_void_p, c_int64, c_int64, c_int64, c_void_p]),
}


def open_library(path: Path) -> ctypes.CDLL:
    """The library at `path`, ready to call. Calls release the GIL. Raises OSError or `BuildError`."""
    library = ctypes.CDLL(str(path))
    library.sfllm_structure_size.restype, library.sfllm_structure_size.argtypes = c_int64, [c_int64]
    for index, structure in enumerate(s.ALL):
        if library.sfllm_structure_size(index) != ctypes.sizeof(structure):
            raise BuildError(f"{path} lays out {structure.__name__} differently")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The kernels for this machine, or None, with one warning, where they cannot be had.

    Matrix tiles (AMX) are used when the variable SFLLM_MATRIX_TILES is 1, and they give right results.
    """
    cache = cache_directory() / "kernels"
    try:
        library = open_library(
            build(cache, WITH_TILES if os.environ.get(TILES_VARIABLE) == "1" else THIS_CPU)
        )
        if not tiles_work(library):
            _log.warning("matrix tiles (AMX) give wrong results here and are left alone")
            library = open_library(build(cache, THIS_CPU))
    except (BuildError, OSError) as error:
        _log.warning("no native kernels, so the model runs in plain torch, several times slower: %s", error)
        return None
    return library


def tiles_work(library: ctypes.CDLL) -> bool:
    """Whether products on matrix tiles, where there are any, equal those without.

    Not every virtual machine that shows the instructions is sure to keep their state.
    """
    tokens = library.sfllm_tiles_from(s.BFLOAT16)
    if not tokens:
        return True
    x = torch.arange(tokens * 64).remainder(7).view(tokens, 64).to(torch.bfloat16)
    weight = torch.arange(32 * 64).remainder(11).view(32, 64).to(torch.bfloat16)
    matrix, result = s.Matrix(weight.data_ptr(), None, 32, 64), torch.zeros(tokens, 32)
    check(library.sfllm_linear(s.BFLOAT16, ctypes.byref(matrix), x.data_ptr(), tokens, result.data_ptr(), 1))
    # Whole numbers this small are exact in any order.
    return torch.equal(result, x.float() @ weight.float().T)


def check(status: int) -> None:
    """Raise MemoryError when a call says that memory ran out."""
    if status:
        raise MemoryError("the native kernels ran out of memory")
