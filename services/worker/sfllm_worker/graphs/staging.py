"""Moves a step's small integers to the device in one copy that nobody waits for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfllm_worker.model.attention import AttentionBatch

Integers = npt.NDArray[np.int64]

ALIGNMENT = 16
"""Every array starts at a multiple of so many elements: kernels are compiled for aligned addresses."""

_RING = 3
"""Pinned buffers in turn. One step runs, one is being launched; a third makes waiting the exception."""

_SMALLEST = 2**16


def aligned(size: int) -> int:
    """`size` rounded up to a whole number of alignments."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class PinnedRing:
    """Host buffers that a copy may still be reading while the next one is filled.

    Owner of the buffers and of an event each, which tells when the device has read it. They have room for
    `size` elements from the start, since making them may wait for the device, and grow beyond when needed.
    """

    def __init__(self, device: torch.device, size: int = _SMALLEST) -> None:
        self._read: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._read += (torch.cuda.Event() for _ in range(_RING))  # type: ignore[no-untyped-call] # torch's
        self._turn = 0
        self._buffers = [self._pinned(size) for _ in range(_RING)]

    def take(self, size: int) -> Tensor:
        """An int64 buffer of `size` elements, with whatever was in it. Fill it, then call `send`."""
        self._turn = (self._turn + 1) % _RING
        if self._read:
            self._read[self._turn].synchronize()  # of an event that was not recorded yet it asks nothing
        buffer = self._buffers[self._turn]
        if len(buffer) < size:
            buffer = self._buffers[self._turn] = self._pinned(2 ** (size - 1).bit_length())
        return buffer[:size]

    def send(self, taken: Tensor, target: Tensor) -> None:
        """Copy what `take` gave last to the device, in the current stream and without waiting."""
        target.copy_(taken, non_blocking=True)
        if self._read:
            self._read[self._turn].record()

    def _pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int64, pin_memory=bool(self._read))


class Staging:
    """Copies arrays of int64 to one device. On a CPU they are there already."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ring = PinnedRing(device)

    def to_device(self, arrays: Sequence[Integers]) -> list[Tensor]:
        """The arrays as tensors on the device, in one copy; on a CPU they share their memory."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        starts = np.cumsum([0, *(aligned(array.size) for array in arrays)]).tolist()
        host = self._ring.take(starts[-1])
        view = host.numpy()
        for array, start in zip(arrays, starts, strict=False):
            view[start : start + array.size] = array.reshape(-1)
        packed = torch.empty(starts[-1], dtype=torch.int64, device=self._device)
        self._ring.send(host, packed)
        return [
            packed[start : start + array.size].view(array.shape)
            for array, start in zip(arrays, starts, strict=False)
        ]

    def batch_to_device(
        self, batch: AttentionBatch, others: Sequence[Tensor]
    ) -> tuple[AttentionBatch, list[Tensor]]:
        """A step's layout, and other int64 host tensors, on the device in one copy."""
        if self._device.type == "cpu":
            return batch, list(others)
        own = (
            batch.block_tables,
            batch.context_lens_tensor,
            batch.slot_mapping,
            batch.positions,
            batch.last_rows,
        )
        tables, contexts, slots, positions, last_rows, *moved = self.to_device(
            [tensor.numpy() for tensor in (*own, *others)]
        )
        on_device = dataclasses.replace(
            batch,
            block_tables=tables,
            context_lens_tensor=contexts,
            slot_mapping=slots,
            positions=positions,
            last_rows=last_rows,
        )
        return on_device, moved
