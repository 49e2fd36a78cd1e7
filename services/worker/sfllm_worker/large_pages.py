"""Memory of the host that the kernel may give in large pages.

A step reads all weights and caches once, which is more than the processor remembers addresses for: with
pages of 4 KiB it looks one up for every 64 lines, in a virtual machine through two tables. Where the kernel
has no pages of 2 MiB, memory is only slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys

import torch
from torch import Tensor

_PAGE_BYTES = 2 * 2**20
_CHUNK_BYTES = 32 * 2**20
_LINE_BYTES = 64
_POPULATE_WRITE = 23
"""`MADV_POPULATE_WRITE` of Linux 5.14, which Python's mmap has no name for."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that cost neither time nor memory until they are used, as the kernel gives zeroed pages.

    `torch.zeros` writes every byte, which for gigabytes takes seconds. Raises OSError when there is no
    address space left.
    """
    size = math.prod(shape) * dtype.itemsize
    # Private, because large pages of shared memory are off on most machines.
    memory = mmap.mmap(-1, size + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    every = torch.frombuffer(memory, dtype=torch.uint8)
    start = -every.data_ptr() % _PAGE_BYTES
    return every[start : start + size].view(dtype).view(shape)


def populate(tensor: Tensor) -> bool:
    """Have the kernel give the memory of a contiguous tensor of `zeros` now, not at its first use.

    What is in it stays. False where the kernel cannot.
    """
    if not sys.platform.startswith("linux"):
        return False
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - start
    # Not mmap's own `madvise`, which would keep all threads of Python waiting.
    madvise = ctypes.CDLL(None).madvise
    done: int = madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _POPULATE_WRITE)
    return done == 0


class Copies:
    """Tensors next to each other in chunks of large pages, most of which would not fill a page of their own.

    A chunk lives as long as any tensor in it.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def of(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor of the host."""
        return self.room(tensor.shape, tensor.dtype).copy_(tensor)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros where the next copy would be."""
        size, start = math.prod(shape) * dtype.itemsize, self._used
        if start + size > self._chunk.nbytes:
            self._chunk, start = zeros((max(_CHUNK_BYTES, size),), torch.uint8), 0
        self._used = start + size + -size % _LINE_BYTES
        return self._chunk[start : start + size].view(dtype).view(shape)
