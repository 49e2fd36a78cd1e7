"""Weights of bfloat16 in three quarters of their memory, to the last bit; `src/compressed.h` has the layout.

A step of few tokens waits for its weights, and compressed ones come sooner. A step of many computes longer
than it waits, so the dense ones are kept for it where memory is plentiful; both compute the same, to the last
bit.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import byref

import torch
from torch import Tensor

from sfllm_worker.large_pages import Copies
from sfllm_worker.native import structures as s
from sfllm_worker.quant.panels import COMPRESSED, PANEL

VARIABLE = "SFLLM_COMPRESSED_WEIGHTS"
"""Set to 0, weights stay as they are."""


def is_served(library: ctypes.CDLL, dtype: torch.dtype) -> bool:
    """Whether weights of that type may be compressed.

    Matrix tiles add in another order, and read dense ones.
    """
    wanted = dtype == torch.bfloat16 and os.environ.get(VARIABLE) != "0"
    return wanted and not library.sfllm_uses_tiles(s.BFLOAT16)


class CompressedPanels:
    """The panels of one dense weight of bfloat16, compressed."""

    def __init__(self, data: Tensor, columns: int, library: ctypes.CDLL) -> None:
        self.data = data
        """uint8 `[panels, bytes]`."""
        self._columns = columns
        self._library = library

    def matrix(self, bias: int | None, unpacked: int | None) -> s.Matrix:
        """What the native library is given, with addresses of the bias and of the dense panels, if kept."""
        shape = len(self.data) * PANEL, self._columns
        return s.Matrix(self.data.data_ptr(), bias, *shape, COMPRESSED, self.data.shape[1], unpacked)

    def words(self) -> Tensor:
        """The dense panels, int32 `[panels, words, 32]`."""
        words = torch.empty(len(self.data), self._columns // 2, PANEL, dtype=torch.int32)
        matrix = self.matrix(None, None)
        self._library.sfllm_unpack(s.BFLOAT16, byref(matrix), words.data_ptr(), torch.get_num_threads())
        return words


def compress(dense: s.Matrix, library: ctypes.CDLL, copies: Copies) -> CompressedPanels | None:
    """A dense weight compressed, among the `copies`; None where that does not pay."""
    threads = torch.get_num_threads()
    panel_bytes: int = library.sfllm_compressed_panel_bytes(byref(dense), threads)
    if not panel_bytes:
        return None
    data = copies.room((dense.rows // PANEL, panel_bytes), torch.uint8)
    library.sfllm_compress(byref(dense), panel_bytes, data.data_ptr(), threads)
    return CompressedPanels(data, dense.columns, library)
