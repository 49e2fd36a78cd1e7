"""Running the model on one step's inputs.

`GraphRunner` is the interface that captured CUDA graphs implement; `EagerRunner`
launches every operation each time, which is all that a CPU needs.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from sfllm_worker.kv.cache import KVCache
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.model.decoder import TextModel


class StepInputs(NamedTuple):
    """What the device needs for a step.

    `token_ids` int64 [num_tokens] in the batch's order; `logit_rows` int64 [num_logit_rows]
    are the tokens whose logits are wanted.
    """

    token_ids: Tensor
    batch: AttentionBatch
    logit_rows: Tensor


class GraphRunner(Protocol):
    """Executes steps over one KV cache."""

    def run(self, inputs: StepInputs) -> Tensor:
        """Logits, float32 [num_logit_rows, vocab_size]; keys and values are in the cache afterwards."""
        ...


class EagerRunner:
    """Launches each operation as it comes."""

    def __init__(self, decoder: TextModel, kv: KVCache) -> None:
        self._decoder = decoder
        self._kv = kv

    def run(self, inputs: StepInputs) -> Tensor:
        """Logits, float32 [num_logit_rows, vocab_size]."""
        hidden = self._decoder.forward(inputs.token_ids, inputs.batch.positions, inputs.batch, self._kv)
        return self._decoder.logits(hidden[inputs.logit_rows])
