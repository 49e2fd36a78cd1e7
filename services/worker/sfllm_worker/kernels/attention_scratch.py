"""Memory for partial results of decode attention, which its two kernels pass between them."""

from __future__ import annotations

import torch
from torch import Tensor

SPLIT_TOKENS = 256
"""Tokens of a split: a constant of the results, since sums are rounded split by split."""


class DecodeScratch:
    """Partial results of rows with several splits, float32, allocated once for the largest launch.

    Captured graphs keep its address, so a reservation that outgrows it leaves the old memory alive. It
    grows at least twofold, so that all the old memory together is less than the new.
    """

    def __init__(
        self, num_heads: int, head_dim: int, device: torch.device | str, split: int = SPLIT_TOKENS
    ) -> None:
        self.split = split
        self.outgrown: list[tuple[Tensor, Tensor]] = []
        self._heads, self._dim, self._device = num_heads, head_dim, torch.device(device)
        self.mixed, self.stats = self._allocate(1)

    def reserve(self, rows: int, longest: int) -> None:
        """Make room for `rows` sequences of up to `longest` tokens.

        Raises `RuntimeError` while a graph is being captured, if there is not room already: memory of the
        graph's own pool would not outlive it.
        """
        needed = rows * self.splits(longest)
        if needed <= len(self.mixed):
            return
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"scratch for {rows} rows of {longest} tokens must be reserved before capture")
        self.outgrown.append((self.mixed, self.stats))
        self.mixed, self.stats = self._allocate(max(needed, 2 * len(self.mixed)))

    def splits(self, longest: int, window: int = 0) -> int:
        """How many splits a context of up to `longest` tokens touches with what a query sees of it."""
        splits = -(-longest // self.split)
        return min(splits, -(-(window - 1) // self.split) + 1) if window else splits

    @staticmethod
    def bytes_needed(
        rows: int, longest: int, num_heads: int, head_dim: int, split: int = SPLIT_TOKENS
    ) -> int:
        """Bytes that a reservation takes."""
        return rows * -(-longest // split) * num_heads * (head_dim + 2) * 4

    def _allocate(self, splits: int) -> tuple[Tensor, Tensor]:
        shape = (splits, self._heads, self._dim)
        mixed = torch.empty(shape, dtype=torch.float32, device=self._device)
        return mixed, torch.empty((*shape[:2], 2), dtype=torch.float32, device=self._device)
