"""Embeddings: the pooled hidden rows of a prompt, however it was cut into steps and whoever ran beside it."""

from __future__ import annotations

import random

import pytest
import torch

from sfllm.messages import Sampling
from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.planner import Limits
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.graphs.runner import EagerRunner
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load import LoadedModel, load_model
from sfllm_worker.model.attention import AttentionBatch

KINDS = ("mean", "last")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-llama", dtype="float32", load_format="dummy")


def engine(model: LoadedModel, blocks: int = 64) -> Engine:
    limits = Limits(max_sequences=8, max_step_tokens=24, block_size=8)
    kv = KVCache(model.config, blocks + 1, limits.block_size, model.dtype)
    return Engine(EagerRunner(model.decoder, kv), kv, limits, model.eos_token_ids, 96, torch.device("cpu"))


def prompts(model: LoadedModel, count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [
        [draw.randrange(model.config.vocab_size) for _ in range(draw.randint(1, 80))] for _ in range(count)
    ]


def asked(key: object, tokens: list[int], kind: str) -> Sequence:
    sampling = Sampling(max_tokens=1, seed=0, pooling=kind)
    return Sequence(key, 0, list(tokens), len(tokens), sampling)


def generating(key: object, tokens: list[int]) -> Sequence:
    sampling = Sampling(max_tokens=12, seed=3, temperature=0.0, ignore_eos=True)
    return Sequence(key, 0, list(tokens), len(tokens), sampling)


def reference(model: LoadedModel, tokens: list[int], kind: str) -> torch.Tensor:
    """From all hidden rows of the prompt, computed at once and alone."""
    kv = KVCache(model.config, 13, 8, model.dtype)
    batch = AttentionBatch.build(
        query_lens=[len(tokens)], context_lens=[len(tokens)], block_tables=[list(range(1, 13))], block_size=8
    )
    with torch.inference_mode():
        hidden = model.decoder.forward(torch.tensor(tokens), batch.positions, batch, kv)
    return hidden.mean(dim=0) if kind == "mean" else hidden[-1]


def run(e: Engine, *sequences: Sequence) -> dict[object, tuple[list[int], tuple[float, ...]]]:
    """The tokens and the embedding that each sequence gave."""
    for sequence in sequences:
        e.add(sequence)
    found: dict[object, tuple[list[int], tuple[float, ...]]] = {}
    for _ in range(2000):
        if not e.has_work:
            return found
        for progress in e.step().progress:
            tokens, _ = found.setdefault(progress.sequence.key, ([], ()))
            if progress.token is not None:
                tokens.append(progress.token)
            if progress.embedding:
                assert progress.finish == "stop"
                found[progress.sequence.key] = (tokens, tuple(progress.embedding))
        e.planner.check_integrity()
    raise AssertionError("the engine makes no progress")


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_pooled_hidden_rows_whatever_else_runs(model: LoadedModel, kind: str) -> None:
    texts = prompts(model, 12)
    others = [generating(("text", number), tokens) for number, tokens in enumerate(prompts(model, 4, seed=1))]
    found = run(engine(model, blocks=24), *others, *(asked(n, text, kind) for n, text in enumerate(texts)))
    for number, text in enumerate(texts):
        tokens, embedding = found[number]
        assert not tokens
        torch.testing.assert_close(
            torch.tensor(embedding), reference(model, text, kind), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_whose_beginning_is_cached_has_the_same_embedding(model: LoadedModel, kind: str) -> None:
    e = engine(model)
    text = prompts(model, 1)[0] * 3
    text = text[:70]
    run(e, generating("first", text))
    hits = e.prefix_hit_tokens
    (_, embedding) = run(e, asked("again", text, kind))["again"]
    torch.testing.assert_close(torch.tensor(embedding), reference(model, text, kind), rtol=1e-4, atol=1e-5)
    assert (e.prefix_hit_tokens > hits) == (kind == "last"), "the mean needs the row of every token"


def test_texts_beside_embeddings_are_those_that_they_would_be_alone(model: LoadedModel) -> None:
    texts = prompts(model, 4, seed=2)
    alone = [run(engine(model), generating(0, text))[0][0] for text in texts]
    beside = run(
        engine(model),
        *(generating(number, text) for number, text in enumerate(texts)),
        *(asked(("e", number), text, "mean") for number, text in enumerate(prompts(model, 6))),
    )
    assert [beside[number][0] for number in range(len(texts))] == alone


def test_a_cancelled_prompt_gives_nothing_and_keeps_nothing(model: LoadedModel) -> None:
    e = engine(model)
    long = asked("long", prompts(model, 1)[0][:1] * 80, "mean")
    e.add(long)
    e.step()
    e.cancel(long)
    assert not run(e)
    assert e.free_kv_tokens == e.kv_tokens
