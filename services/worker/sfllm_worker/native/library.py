"""How the compiled kernels are called."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from pathlib import Path

from sfllm_worker.native import structures as s
from sfllm_worker.native.build import BuildError

_SIGNATURES = {
    "sfllm_decoder_step": (c_int, [POINTER(s.ModelSpec), POINTER(s.KVSpec), POINTER(s.StepSpec)]),
    "sfllm_wait_for_helpers": (None, []),
    "sfllm_uses_tiles": (c_int, [c_int64]),
    "sfllm_linear": (c_int, [c_int64, POINTER(s.Matrix), c_void_p, c_int64, c_int64, c_void_p, c_int64]),
    "sfllm_compressed_panel_bytes": (c_int64, [POINTER(s.Matrix), c_int64]),
    "sfllm_compress": (None, [POINTER(s.Matrix), c_int64, c_void_p, c_int64]),
    "sfllm_unpack": (None, [c_int64, POINTER(s.Matrix), c_void_p, c_int64]),
    "sfllm_embed": (
        c_int,
        [c_int64, POINTER(s.Matrix), c_int64, c_void_p, c_int64, c_float, c_void_p, c_int64],
    ),
    "sfllm_attend": (c_int, [POINTER(s.AttentionSpec), POINTER(s.StepSpec)]),
    "sfllm_store_kv": (None, [POINTER(s.AttentionSpec), POINTER(s.StepSpec), c_void_p, c_void_p]),
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


def check(status: int) -> None:
    """Raise MemoryError when a call says that memory ran out."""
    if status:
        raise MemoryError("the native kernels ran out of memory")
