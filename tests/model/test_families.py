"""Every family and option against transformers, on the same float32 weights, in all kinds of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_references import (
    BLOCK,
    Sequences,
    make_reference,
    reference_greedy,
    reference_logits,
    stepwise_logits,
)
from model_variants import BUILT_IN, THROUGH_TRANSFORMERS, VARIANTS

from sfllm.messages import Sampling
from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.planner import Limits
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.graphs.runner import EagerRunner
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load import LoadedModel, load_model
from sfllm_worker.model.families import FAMILIES
from sfllm_worker.model.transformers_model import TransformersModel

TOLERANCE = 1e-4
LENGTHS = (97, 61, 45, 30)
"""Of the texts that are compared: all longer than every window, and than the lengths that are scaled."""


class Pair:
    """A model of transformers, ours from the same files, and texts with their logits."""

    def __init__(self, name: str, directory: Path) -> None:
        self.variant = VARIANTS[name]
        self.reference: Any = make_reference(name, directory)
        context = self.variant.context_length
        self.loaded: LoadedModel = load_model(directory, dtype="float32", context_length=context)
        self.texts = [tokens(length, seed=length) for length in LENGTHS]
        self.logits = [self.reference_logits(text) for text in self.texts]

    def reference_logits(self, text: list[int]) -> torch.Tensor:
        compute = reference_logits if self.variant.reference == "whole" else stepwise_logits
        return compute(self.reference, text)

    def run(self, num_sequences: int) -> Sequences:
        return Sequences(self.loaded.decoder, num_sequences, 120)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("model"))


def tokens(count: int, seed: int) -> list[int]:
    values: list[int] = torch.randint(
        0, 300, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return values


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def test_a_prompt_alone(pair: Pair) -> None:
    [ours] = pair.run(1).step([(0, pair.texts[0])])
    assert pair.logits[0].std() > 0.5  # logits that hardly vary would agree whatever we compute
    assert difference(ours, pair.logits[0]) <= TOLERANCE


def test_greedy_tokens_of_a_batch_of_mixed_lengths(pair: Pair) -> None:
    lengths = [max(length, pair.variant.shortest) for length in (1, 3, 4, 5, 40, 90)]
    prompts = [tokens(length, seed=length) for length in lengths]
    answers = pair.run(len(prompts)).greedy(prompts, 12)
    for prompt, answer in zip(prompts, answers, strict=True):
        # Each token is the best after all before it, which is what greedy decoding of transformers gives.
        theirs = pair.reference_logits(prompt + answer[:-1])[len(prompt) - 1 :]
        assert answer == theirs.argmax(-1).tolist()


def test_chunks_among_decodes(pair: Pair) -> None:
    run = pair.run(4)
    parts: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    done = [0] * 4
    # Each round lists (sequence, tokens); decodes come first, chunks end inside and at the edges of blocks.
    rounds = [
        [(3, 5), (0, 8)],
        [(3, 1), (0, 1), (1, 13)],
        [(0, 1), (3, 1), (1, 1), (2, 20)],
        [(3, 1), (1, 30), (0, 7), (2, 1)],
        [(0, 1), (3, 1), (2, 24), (1, 17)],
        [(0, 79), (3, 21)],
    ]
    for step in rounds:
        work = []
        for index, count in step:
            work.append((index, pair.texts[index][done[index] : done[index] + count]))
            done[index] += count
        for (index, _), logits in zip(step, run.step(work), strict=True):
            parts[index].append(logits)
    assert tuple(done) == LENGTHS
    for pieces, theirs in zip(parts, pair.logits, strict=True):
        assert difference(torch.cat(pieces), theirs) <= TOLERANCE


def test_a_prompt_that_goes_on_after_a_prefix_in_the_cache(pair: Pair) -> None:
    run, text = pair.run(3), pair.texts[0]
    run.step([(0, text[:50])])
    run.share_prefix(0, 1, num_blocks=10)
    run.share_prefix(0, 2, num_blocks=12)
    long, short = run.step([(1, text[40:90]), (2, text[48:49])][::-1])[::-1]
    assert difference(long, pair.logits[0][40:90]) <= TOLERANCE
    assert difference(short, pair.logits[0][48:49]) <= TOLERANCE


def test_lengths_around_every_edge_of_blocks_and_windows(pair: Pair) -> None:
    lengths = range(1, 26)  # windows are at most 12 tokens, blocks 4
    text, theirs = pair.texts[1], pair.logits[1]
    run = pair.run(len(lengths))
    prompts = sorted(((i, text[:length]) for i, length in enumerate(lengths)), key=lambda p: len(p[1]) > 1)
    for (_, prompt), logits in zip(prompts, run.step(prompts), strict=True):
        assert difference(logits, theirs[: len(prompt)]) <= TOLERANCE
    for step in range(3):
        work = [(i, text[length + step : length + step + 1]) for i, length in enumerate(lengths)]
        expected = theirs[[length + step for length in lengths]]
        assert difference(torch.cat(run.step(work)), expected) <= TOLERANCE


@pytest.mark.parametrize("count", [1, 2])
def test_blocks_outside_of_the_window_are_not_even_read(count: int, tmp_path: Path) -> None:
    pair = Pair("mistral-window", tmp_path)
    run, text = pair.run(3), pair.texts[0]
    prompts = [(0, text[:17]), (1, text[:40]), (2, text[:70])]
    run.step(prompts)
    for index, prompt in prompts:
        unseen = (len(prompt) + 1 - 8) // BLOCK  # whole blocks before the next token's window of 8
        for layer in run.kv.layers:
            layer.k[run.tables[index][:unseen]] = float("nan")
            layer.v[run.tables[index][:unseen]] = float("nan")
    nexts = [(index, text[len(prompt) : len(prompt) + count]) for index, prompt in prompts]
    for (_, prompt), ours in zip(prompts, run.step(nexts), strict=True):
        assert difference(ours, pair.logits[0][len(prompt) : len(prompt) + count]) <= TOLERANCE


def test_the_table_of_variants_covers_every_family() -> None:
    names = {f"{variant.family.removesuffix('Text')}ForCausalLM" for variant in BUILT_IN.values()}
    assert names == set(FAMILIES)


@pytest.mark.parametrize("name", ["llama", "llama-dynamic-rope", "gemma2", "gpt-neox"])
def test_greedy_tokens_equal_those_of_the_generate_of_transformers(name: str, tmp_path: Path) -> None:
    pair = Pair(name, tmp_path)
    prompts = [tokens(length, seed=length) for length in (1, 4, 11, 20)]
    ours = pair.run(4).greedy(prompts, 12)
    assert ours == [reference_greedy(pair.reference, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("name", THROUGH_TRANSFORMERS)
def test_only_unknown_architectures_go_through_transformers(name: str, tmp_path: Path) -> None:
    assert isinstance(Pair(name, tmp_path).loaded.decoder, TransformersModel)


def test_the_engine_with_prefix_hits_and_preemption(pair: Pair) -> None:
    """More sequences than the cache holds, which begin alike: every answer is still the greedy one."""
    blocks = 26
    limits = Limits(max_sequences=6, max_step_tokens=24, block_size=BLOCK)
    loaded = pair.loaded
    kv = KVCache(loaded.config, blocks + 1, BLOCK, torch.float32)
    engine = Engine(EagerRunner(loaded.decoder, kv), kv, limits, (), blocks * BLOCK, torch.device("cpu"))
    common = tokens(24, seed=1)
    sampling = Sampling(max_tokens=14, seed=0, temperature=0.0)
    sequences = []
    for seed in range(5):
        prompt = common + tokens(3 + 2 * seed, seed=100 + seed)
        sequences.append(Sequence(seed, 0, prompt, len(prompt), sampling))
        engine.add(sequences[-1])
    preempted = 0
    while engine.has_work:
        preempted += engine.step().preempted
        engine.planner.check_integrity()
    assert preempted > 0
    assert [sequence.cached_tokens for sequence in sequences] == [0, 24, 24, 24, 24]
    for sequence in sequences:
        prompt, answer = sequence.tokens[: sequence.prompt_count], sequence.tokens[sequence.prompt_count :]
        theirs = pair.reference_logits(sequence.tokens[:-1])[len(prompt) - 1 :]
        assert answer == theirs.argmax(-1).tolist()
