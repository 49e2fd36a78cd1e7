"""Choosing tokens in the native library: all rows of a step in one call, on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
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
_SPECS = np.dtype(SampleSpec)
_SEED_MASK = 0xFFFFFFFFFFFFFFFF
_GREEDY = (1.0, 0.0, 0.0, 0, 0, 0, 0)
_ALL_ALLOWED = 0
_NO_MASKS: Mapping[int, npt.NDArray[np.int64]] = MappingProxyType({})


def can_choose_natively(logits: Tensor) -> bool:
    """Whether these logits are on a CPU that has the library."""
    return logits.device.type == "cpu" and logits.is_contiguous() and native_library() is not None


def choose_natively(
    logits: Tensor, rows: Sequence[SamplingRow], masks: Mapping[int, npt.NDArray[np.int64]] = _NO_MASKS
) -> tuple[list[int], list[bool]]:
    """What `choose_in_torch` does. `logits` float32 `[num_rows, vocab_size]`, contiguous, are overwritten.

    `masks` by the index of a row, as in `constrain.py`.
    """
    library = native_library()
    assert isinstance(library, ctypes.CDLL)
    allowed = {index: mask.ctypes.data for index, mask in masks.items()}
    fields = [(*_spec(row), allowed.get(index, _ALL_ALLOWED)) for index, row in enumerate(rows)]
    specs = np.array(fields, dtype=_SPECS)
    tokens, sound = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.bool_)
    results = (tokens.ctypes.data, sound.ctypes.data, torch.get_num_threads())
    check(library.sfllm_sample(logits.data_ptr(), *logits.shape, specs.ctypes.data, *results))
    return tokens.tolist(), sound.tolist()


def _spec(row: SamplingRow) -> tuple[float, float, float, int, int, int, int]:
    """The fields of a `SampleSpec` but for the last."""
    s = row.sampling
    if s.temperature < GREEDY_BELOW_TEMPERATURE:
        return _GREEDY
    position = len(row.tokens) + row.unread - row.prompt_count
    return s.top_p, s.temperature, s.min_p, s.top_k, s.seed & _SEED_MASK, position, row.choice
