"""Tokens that are being chosen: launched on the device, and read when they are there.

On a GPU `sampling/device.py` does it. `SynchronousSampler` is all that a CPU needs, where a launch
returns when its work is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sfllm.token_batch import Logprobs
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.sampler import Sampled, sample


class PendingSample(Protocol):
    """What comes of a launch, one entry per row."""

    @property
    def tokens(self) -> Tensor:
        """Int64 `[num_rows]` on the device, for what is launched later. Always tokens of the vocabulary."""
        ...

    def read(self) -> tuple[list[int], list[bool], list[Logprobs]]:
        """What `sampler.sample` gives. Waits for this launch and those before it, for nothing later."""
        ...


class TokenSampler(Protocol):
    """Launches the choice of tokens."""

    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> PendingSample:
        """Choose a token for each row of `logits`, float32 `[num_rows, vocab_size]`, which may be changed.

        `rows` are read before it returns. There may be none: then what comes of it only waits.
        """
        ...


class SynchronousSampler:
    """Chooses tokens when it is asked to."""

    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> PendingSample:
        """The tokens, which are there already."""
        return _ReadySample(sample(logits, rows) if rows else Sampled([], [], []))


class _ReadySample(NamedTuple):
    sampled: Sampled

    @property
    def tokens(self) -> Tensor:
        return torch.tensor(self.sampled.tokens, dtype=torch.int64)

    def read(self) -> Sampled:
        return self.sampled
