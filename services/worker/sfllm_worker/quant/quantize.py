"""Chooses the integers, scales and offsets for weights that come as floats.

Round to nearest, without calibration data. Eight bits: symmetric, the scale from the group's largest
magnitude (as GGUF's Q8_0, or LLM.int8() of Dettmers et al., 2022, with smaller groups). Four bits: affine;
the range is tried in several widths, for each of them scale and offset follow by least squares from the
rounded values, and the try with the least squared error is kept, which is the search of llama.cpp's
`make_qkx2_quants` without its importance weights. Clipping a range for a smaller total error goes back to
ACIQ (Banner et al., 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfllm_worker.quant.weight import GROUP, QuantizedWeight

_STEPS = (15.0, 14.0, 16.0, 17.0)
"""Into how many steps the range between a group's extremes is cut; more than 15 clips the extremes."""
_CHUNK = 1 << 18
"""Elements that are worked on at once: temporaries stay in the processor's cache."""
_LARGEST = float(torch.finfo(torch.float16).max)


def quantize(weight: Tensor, bits: int) -> QuantizedWeight:
    """The weight `[rows, columns]`, of any float type, in `bits` (4 or 8) bits.

    Raises ValueError for weights that are not finite or too large for a scale in float16.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights can be quantized to 4 or 8 bits, not {bits}")
    rows, columns = weight.shape
    padding = -columns % GROUP
    count = max(1, _CHUNK // (columns + padding))
    parts = []
    for start in range(0, rows, count):
        chunk = weight[start : start + count].to(torch.float32)
        if padding:  # by the short group's own values in turn, so that each counts about as much in its fit
            short = chunk[:, padding - GROUP :]
            again = short.repeat(1, -(-padding // short.shape[1]))[:, :padding]
            chunk = torch.cat((chunk, again), dim=1)
        groups = chunk.reshape(len(chunk), -1, GROUP)
        if not float(groups.abs().amax()) < _LARGEST:
            raise ValueError("weights are not finite, or larger than float16 can say")
        values, scales, offsets = _eight_bits(groups) if bits == 8 else _four_bits(groups)
        parts.append((values.reshape(len(chunk), -1)[:, :columns], scales[..., 0], offsets))
    offset_parts = [offsets[..., 0] for _, _, offsets in parts if offsets is not None]
    return QuantizedWeight(
        torch.cat([values for values, _, _ in parts]),
        torch.cat([scales for _, scales, _ in parts]),
        torch.cat(offset_parts) if offset_parts else None,
    )


def _eight_bits(groups: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    largest = groups.abs().amax(-1, keepdim=True)
    scales = (largest / 127).to(torch.float16)
    # Rounded up where the largest value would be clipped: the next number is that of the next bits.
    short = scales.float() * 127 < largest
    scales = (scales.view(torch.int16) + short.to(torch.int16)).view(torch.float16)
    return (groups * _inverse(scales)).round_().to(torch.int8), scales, None


def _four_bits(groups: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    lowest, highest = groups.aminmax(dim=-1, keepdim=True)
    best_error = torch.full_like(lowest, torch.inf)
    best_scale, best_offset = (torch.zeros_like(lowest, dtype=torch.float16) for _ in range(2))
    total = groups.sum(-1, keepdim=True)
    for steps in _STEPS:
        # A range that is too wide keeps the middle: as much is cut off below as above.
        width = (highest - lowest) / steps
        start = lowest + width * (steps - 15) / 2
        scale, offset = (x.to(torch.float16) for x in _fitted(groups, total, width, start))
        values = _rounded(groups, scale, offset)
        error = (values * scale.float()).add_(offset.float()).sub_(groups).square_().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_offset = torch.where(better, offset, best_offset)
    return _rounded(groups, best_scale, best_offset).to(torch.uint8), best_scale, best_offset


def _fitted(groups: Tensor, total: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset with the least squared error for the values that the given ones lead to."""
    values = _rounded(groups, scale, offset)
    sums, squares = values.sum(-1, keepdim=True), values.square().sum(-1, keepdim=True)
    products = (values * groups).sum(-1, keepdim=True)
    spread = GROUP * squares - sums.square()
    fitted = (GROUP * products - sums * total) / spread
    scale = torch.where(spread > 0, fitted, torch.zeros_like(fitted))
    return scale, (total - scale * sums) / GROUP


def _rounded(groups: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return (groups - offset.float()).mul_(_inverse(scale)).round_().clamp_(0, 15)


def _inverse(scale: Tensor) -> Tensor:
    """One over the scale in float32, and zero for a scale of zero."""
    wide = scale.float()
    return torch.where(wide == 0, wide, 1 / wide)
