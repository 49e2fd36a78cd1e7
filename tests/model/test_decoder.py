"""What holds for the decoder whatever the family; `test_families` compares each with transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from model_references import Sequences, make_reference, reference_logits

from sfllm_worker.load import LoadedModel, load_model

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Pair:
    reference: Any
    loaded: LoadedModel
    directory: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def make(variant: str) -> Pair:
        if variant not in made:
            directory = tmp_path_factory.mktemp(variant)
            reference = make_reference(variant, directory)
            made[variant] = Pair(reference, load_model(directory, dtype="float32"), directory)
        return made[variant]

    return make


def tokens(count: int, seed: int) -> list[int]:
    values: list[int] = torch.randint(
        0, 300, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return values


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


def test_a_row_does_not_depend_on_its_batch_mates(pair: Callable[[str], Pair]) -> None:
    decoder = pair("llama").loaded.decoder
    text = tokens(20, seed=5)
    alone = Sequences(decoder, 1, 24)
    alone.step([(0, text[:-1])])
    [expected] = alone.step([(0, text[-1:])])
    crowd = Sequences(decoder, 12, 200, seed=3)
    crowd.step([(index, tokens(10 + 17 * index, seed=index)) for index in range(1, 12)] + [(0, text[:-1])])
    together = crowd.step([(index, tokens(1, seed=50 + index)) for index in range(1, 12)] + [(0, text[-1:])])
    assert difference(together[-1], expected) <= 1e-5


def test_stale_contents_of_reused_blocks_do_not_reach_the_result(pair: Callable[[str], Pair]) -> None:
    both = pair("llama")
    run = Sequences(both.loaded.decoder, 2, 40)
    for layer in run.kv.layers:
        layer.k.fill_(50.0)
        layer.v.fill_(-50.0)
    text = tokens(11, seed=8)
    run.step([(0, text[:-1]), (1, tokens(33, seed=9))])
    ours, _ = run.step([(0, text[-1:]), (1, tokens(1, seed=10))])
    assert difference(ours, reference_logits(both.reference, text)[-1:]) <= TOLERANCE


@pytest.mark.parametrize("variant", ["qwen3", "gemma2", "gemma3", "phi3-partial-rotary"])
def test_bfloat16_stays_close_to_float32(pair: Callable[[str], Pair], variant: str) -> None:
    both = pair(variant)
    half = load_model(both.directory, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    text = tokens(40, seed=2)
    [ours] = Sequences(half.decoder, 1, 40).step([(0, text)])
    [theirs] = Sequences(both.loaded.decoder, 1, 40).step([(0, text)])
    assert ours.dtype == torch.float32
    similarity = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    assert float(similarity.min()) > 0.99


def test_a_float16_cache_and_model_run_on_this_device(pair: Callable[[str], Pair]) -> None:
    half = load_model(pair("llama").directory, dtype="float16")
    run = Sequences(half.decoder, 2, 20)
    run.step([(0, tokens(9, seed=1)), (1, tokens(4, seed=2))])
    logits = run.step([(0, tokens(1, seed=3)), (1, tokens(1, seed=4))])
    assert all(bool(torch.isfinite(part).all()) for part in logits)


def test_a_tied_head_shares_the_memory_of_the_embedding(pair: Callable[[str], Pair]) -> None:
    tied, untied = pair("llama-tied").loaded, pair("llama").loaded
    table = tied.config.vocab_size * tied.config.hidden_size * 4
    assert untied.weight_bytes - tied.weight_bytes == table
