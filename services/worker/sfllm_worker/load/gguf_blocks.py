"""Takes the integers and scales out of those GGUF block types that `QuantizedWeight` holds exactly.

The blocks are those of llama.cpp's ggml-common.h: 32 columns with a scale in half precision, for Q4_1 then
a minimum, then the values; of four-bit values, the lower halves of 16 bytes come first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from sfllm_worker.quant.weight import GROUP, QuantizedWeight

FINER_THAN_FOUR_BITS = frozenset(
    getattr(GGMLQuantizationType, name) for name in ("Q5_0", "Q5_1", "Q5_K", "Q6_K")
)
"""Types for the tensors to which whoever made a file gave more than four bits."""


def unpack_blocks(data: Any, kind: GGMLQuantizationType) -> QuantizedWeight | None:
    """The weight of raw blocks, uint8 `[rows, bytes]`; None when the type is not Q4_0, Q4_1 or Q8_0."""
    numbers = {
        GGMLQuantizationType.Q4_0: 1,
        GGMLQuantizationType.Q4_1: 2,
        GGMLQuantizationType.Q8_0: 1,
    }.get(kind)
    if numbers is None:
        return None
    value_bytes = GROUP if kind == GGMLQuantizationType.Q8_0 else GROUP // 2
    blocks = data.reshape(len(data), -1, 2 * numbers + value_bytes)
    head = torch.from_numpy(np.ascontiguousarray(blocks[:, :, : 2 * numbers])).view(torch.float16)
    values = torch.from_numpy(np.ascontiguousarray(blocks[:, :, 2 * numbers :]))
    return QuantizedWeight(
        _values(values).reshape(len(data), -1),
        head[:, :, 0].contiguous(),
        head[:, :, 1].contiguous() if numbers == 2 else None,
    )


def _values(stored: Tensor) -> Tensor:
    """int8, or uint8 for four bits: `[rows, blocks, 32]`."""
    if stored.shape[-1] == GROUP:
        return stored.view(torch.int8)
    return torch.cat((stored & 15, stored >> 4), dim=-1)
