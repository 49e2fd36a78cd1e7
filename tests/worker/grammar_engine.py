"""An engine over a tiny real model whose tokens are bytes, for tests of output that follows a grammar."""

from __future__ import annotations

from typing import Any

import torch

from sfllm.messages import Sampling
from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.interface import Progress
from sfllm_worker.engine.pending import TokenSampler
from sfllm_worker.engine.planner import Limits
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.graphs.runner import EagerRunner
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load import LoadedModel
from sfllm_worker.load.dummy import byte_tokenizer
from sfllm_worker.structured.grammars import Grammars

TOKENIZER = byte_tokenizer(512)
PROMPT = TOKENIZER.encode("Describe a thing: ").ids


def engine(
    model: LoadedModel,
    grammars: Grammars,
    blocks: int = 128,
    sampler: TokenSampler | None = None,
    overlap: bool = False,
    **limits: int,
) -> Engine:
    chosen = Limits(max_sequences=8, max_step_tokens=24, block_size=8)._replace(**limits)
    kv = KVCache(model.config, blocks + 1, chosen.block_size, model.dtype)
    cpu = torch.device("cpu")
    return Engine(
        *(EagerRunner(model.decoder, kv), kv, chosen, model.eos_token_ids, 400, cpu, sampler, overlap),
        grammars=grammars,
    )


def asked(
    key: object, grammar: str = "", tokens: list[int] = PROMPT, forks: int = 0, **fields: Any
) -> Sequence:
    sampling = Sampling(**{"max_tokens": 200, "seed": 5, "grammar": grammar, **fields})
    return Sequence(key, 0, list(tokens), len(PROMPT), sampling, tuple(range(1, forks + 1)))


class Answer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.last: Progress | None = None

    @property
    def text(self) -> str:
        return str(TOKENIZER.decode(self.tokens))

    @property
    def finish(self) -> str | None:
        assert self.last is not None
        return self.last.finish


def run(e: Engine, *sequences: Sequence) -> dict[tuple[object, int], Answer]:
    for sequence in sequences:
        e.add(sequence)
    answers: dict[tuple[object, int], Answer] = {}
    for _ in range(5000):
        if not e.has_work:
            e.check_integrity()
            return answers
        for progress in e.step().progress:
            answer = answers.setdefault((progress.sequence.key, progress.sequence.choice), Answer())
            answer.last = progress
            if progress.token is not None:
                answer.tokens.append(progress.token)
    raise AssertionError("the engine makes no progress")
