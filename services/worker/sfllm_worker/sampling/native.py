"""Choosing tokens in the native library: all rows of a step in one call, on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_bool, c_int64
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfllm_worker.native.choice import native_library
from sfllm_worker.native.library import check
from sfllm_worker.native.structures import SampleSpec
from sfllm_worker.sampling.adjust import SamplingRow

GREEDY_BELOW_TEMPERATURE = 1e-5
_SEED_MASK = 0xFFFFFFFFFFFFFFFF
_NO_MASKS: Mapping[int, npt.NDArray[np.int64]] = MappingProxyType({})


def can_choose_natively(logits: Tensor) -> bool:
    """Whether these logits are on a CPU that has the library."""
    return logits.is_cpu and logits.is_contiguous() and native_library() is not None


def choose_natively(
    logits: Tensor, rows: Sequence[SamplingRow], masks: Mapping[int, npt.NDArray[np.int64]] = _NO_MASKS
) -> tuple[list[int], list[bool]]:
    """What `choose_in_torch` does. `logits` float32 `[num_rows, vocab_size]`, contiguous, are overwritten.

    `masks` by the index of a row, as in `constrain.py`.
    """
    library = native_library()
    assert isinstance(library, ctypes.CDLL)
    count = len(rows)
    specs: ctypes.Array[SampleSpec] | None = None
    if masks or any(row.sampling.temperature >= GREEDY_BELOW_TEMPERATURE for row in rows):
        specs = (SampleSpec * count)(*[_spec(row, masks.get(index)) for index, row in enumerate(rows)])
    tokens, sound = (c_int64 * count)(), (c_bool * count)()
    results = (tokens, sound, torch.get_num_threads())
    check(library.sfllm_sample(logits.data_ptr(), count, logits.shape[1], specs, *results))
    return tokens[:], sound[:]


def _spec(row: SamplingRow, mask: npt.NDArray[np.int64] | None) -> SampleSpec:
    s = row.sampling
    allowed = None if mask is None else mask.ctypes.data
    if s.temperature < GREEDY_BELOW_TEMPERATURE:
        return SampleSpec(allowed=allowed)
    return SampleSpec(
        *(s.top_p, s.temperature, s.min_p, s.top_k, s.seed & _SEED_MASK, row.position, row.choice, allowed)
    )
