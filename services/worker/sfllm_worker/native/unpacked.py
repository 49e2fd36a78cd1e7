"""Quantized and compressed weights that are kept unpacked as well, where memory is plentiful.

A step of few tokens waits for its weights, and packed ones come sooner. A step of many computes longer
than it waits, and unpacking comes on top; from words that were unpacked beforehand it computes the same, to
the last bit.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence

import torch

from sfllm_worker import sizing
from sfllm_worker.large_pages import Copies
from sfllm_worker.native.attention import ELEMENT_TYPES
from sfllm_worker.native.quantized_panels import QuantizedPanelLinear

_log = logging.getLogger(__name__)

VARIABLE = "SFLLM_UNPACKED_WEIGHTS"
"""Set to 0, none are kept."""

FREE_SHARE = 16
"""The copies take at most this part of free memory: a larger model leaves it to the KV cache."""


def fits(copy_bytes: int, free_bytes: int) -> bool:
    """Whether copies of all weights, of so many bytes together, may be kept where so many are free."""
    return copy_bytes * FREE_SHARE <= free_bytes


def may_keep(needed: int) -> bool:
    """Whether copies of that many bytes together are kept."""
    if not needed or os.environ.get(VARIABLE) == "0":
        return False
    free = sizing.free_bytes(torch.device("cpu"))
    if not fits(needed, free):
        _log.info("no unpacked weights are kept: %d bytes are not 1/%d of %d", needed, FREE_SHARE, free)
        return False
    _log.info("unpacked weights are kept for steps of many tokens: %d bytes", needed)
    return True


def keep_unpacked(linears: Sequence[QuantizedPanelLinear], library: ctypes.CDLL) -> int:
    """Give each of the layers its unpacked words, or none of them: bytes that are kept."""
    needed = sum(linear.unpacked_bytes for linear in linears)
    if not may_keep(needed):
        return 0
    # Apart from the quantized ones, which so stay next to each other.
    copies = Copies()
    for linear in linears:
        words = copies.room(linear.unpacked_shape, torch.int32)
        matrix, threads = linear.matrix(), torch.get_num_threads()
        library.sfllm_unpack(ELEMENT_TYPES[linear.dtype], ctypes.byref(matrix), words.data_ptr(), threads)
        linear.unpacked = words
    return needed
