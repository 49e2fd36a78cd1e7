"""A model that can be checked: its next token is a function of the tokens that it finds in the cache.

It finds them through the block table. A block that is freed too early, written while shared, copied
wrongly or found under the wrong hash therefore changes the output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq

import torch

from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.planner import Limits
from sfllm_worker.graphs.runner import StepInputs

VOCAB_SIZE = 50
BLOCK_SIZE = 4
NUM_BLOCKS = 15
MAX_MODEL_LEN = 40
LIMITS = Limits(max_sequences=5, max_step_tokens=11, block_size=BLOCK_SIZE)


def next_token(context: Seq[int]) -> int:
    """What the fake model says after these tokens."""
    return hashlib.blake2b(bytes(context), digest_size=2).digest()[0] % VOCAB_SIZE


def is_faulty(context: Seq[int]) -> bool:
    """Whether the fake model breaks down after these tokens, if it is one that does."""
    return hashlib.blake2b(bytes(context), digest_size=2).digest()[1] < 4


class TokenCache:
    """In the place of keys and values, each slot holds the token that was computed there."""

    def __init__(self, num_blocks: int = NUM_BLOCKS + 1) -> None:
        self.num_blocks = num_blocks
        self.slots = torch.full((self.num_blocks, BLOCK_SIZE), -1)

    def copy_blocks(self, pairs: Seq[tuple[int, int]]) -> None:
        content = [self.slots[source].clone() for source, _ in pairs]
        for (_, target), block in zip(pairs, content, strict=True):
            self.slots[target] = block

    def zero_blocks(self, blocks: Seq[int]) -> None:
        self.slots[list(blocks)] = -1


class FakeRunner:
    """Writes a step's tokens into the cache and reads each context back through its block table.

    With `faults` some contexts give logits that are not finite.
    """

    def __init__(self, cache: TokenCache, faults: bool = False) -> None:
        self.cache = cache
        self.faults = faults

    def run(self, inputs: StepInputs) -> torch.Tensor:
        batch = inputs.batch
        self.cache.slots.view(-1)[batch.slot_mapping] = inputs.token_ids
        contexts = []
        for index, (query_len, context_len) in enumerate(
            zip(batch.query_lens, batch.context_lens, strict=True)
        ):
            stored = self.cache.slots[batch.block_tables[index]].view(-1)[:context_len].tolist()
            contexts += [stored[: context_len - query_len + 1 + offset] for offset in range(query_len)]
        logits = torch.linspace(0.5, 0, VOCAB_SIZE).repeat(len(inputs.logit_rows), 1)
        for row, position in enumerate(inputs.logit_rows):
            assert min(contexts[position]) >= 0, "a slot is read that was never written"
            logits[row, next_token(contexts[position])] = 1.0
            if self.faults and is_faulty(contexts[position]):
                logits[row] = torch.nan
        return logits


def fake_engine() -> Engine:
    """A real engine around the fake model; token 7 ends a text."""
    cache = TokenCache()
    cpu = torch.device("cpu")
    return Engine(FakeRunner(cache), cache, LIMITS, (7,), MAX_MODEL_LEN, cpu)  # type: ignore[arg-type]
