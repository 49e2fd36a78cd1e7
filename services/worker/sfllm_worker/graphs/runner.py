"""Running the model on one step's inputs.

`GraphRunner` is what an engine calls. `EagerRunner` launches every operation each time, which is all that
a CPU needs; `CapturedRunner`, in `captured.py`, replays CUDA graphs where it can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sfllm_worker.graphs.figures import GraphFigures
from sfllm_worker.graphs.staging import Staging
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.model.decoder import TextModel
from sfllm_worker.model.layers import some_rows


class StepInputs(NamedTuple):
    """What a step is, on the host: the runner moves it to the device.

    `token_ids` int64 [num_tokens] in the batch's order; on the device already when tokens of a step that
    was not read yet are among them. `logit_rows` are the tokens whose logits are wanted, as rows of the
    batch. `on_hidden`, if any, gets the final hidden rows [num_tokens, hidden_size] of all tokens.
    """

    token_ids: Tensor
    batch: AttentionBatch
    logit_rows: list[int]
    on_hidden: Callable[[Tensor], None] | None = None

    @property
    def wants_all_logits(self) -> bool:
        """Whether those of every token are wanted, in their order."""
        count = self.batch.num_tokens
        return len(self.logit_rows) == count and self.logit_rows == list(range(count))


class GraphRunner(Protocol):
    """Executes steps over one KV cache."""

    figures: GraphFigures
    """What it has done so far."""

    def run(self, inputs: StepInputs) -> Tensor:
        """Logits, float32 [num_logit_rows, vocab_size]; keys and values are in the cache afterwards.

        They are valid until the next run, in the order of the device's stream: whatever is launched on
        them before it reads what it should. On a GPU nothing here waits for the device.
        """
        ...

    def idle(self) -> bool:
        """Use a moment without work for preparations, a fraction of a second at most; True if more remain."""
        ...


class EagerRunner:
    """Launches each operation as it comes."""

    def __init__(self, decoder: TextModel, kv: KVCache) -> None:
        self._decoder = decoder
        self._kv = kv
        self._staging = Staging(kv.device)
        self.figures = GraphFigures()

    def run(self, inputs: StepInputs) -> Tensor:
        """Logits, float32 [num_logit_rows, vocab_size]."""
        self.figures.eager_steps += 1
        token_ids = inputs.token_ids
        some = [] if inputs.wants_all_logits else [torch.tensor(inputs.logit_rows, dtype=torch.int64)]
        if token_ids.device == self._kv.device:
            batch, some = self._staging.batch_to_device(inputs.batch, some)
        else:
            batch, [token_ids, *some] = self._staging.batch_to_device(inputs.batch, [token_ids, *some])
        rows = some[0] if some else None
        if inputs.on_hidden is None:
            return self._decoder.logits(
                self._decoder.forward(token_ids, batch.positions, batch, self._kv, rows)
            )
        hidden = self._decoder.forward(token_ids, batch.positions, batch, self._kv)
        inputs.on_hidden(hidden)
        return self._decoder.logits(some_rows(hidden, rows))

    def idle(self) -> bool:
        """There is nothing to prepare."""
        return False
