"""Whole steps: native against plain torch, and against themselves in other batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from model_references import Sequences
from torch import Tensor

from sfllm_worker.load import load_model
from sfllm_worker.model.decoder import Decoder
from sfllm_worker.native import structures as s
from sfllm_worker.native.build import build
from sfllm_worker.native.choice import native_library
from sfllm_worker.native.decoder import NativeDecoder
from sfllm_worker.native.library import open_library

PROMPT = 150
DTYPES = ["float32", "bfloat16"]


def native(dtype: str, shape: str = "tiny-qwen3") -> NativeDecoder:
    decoder = load_model(shape, dtype=dtype, load_format="dummy").decoder
    if not isinstance(decoder, NativeDecoder):
        pytest.skip("no native kernels here")
    return decoder


def tokens(count: int, seed: int) -> list[int]:
    values: list[int] = torch.randint(512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return values


def alone(decoder: Decoder, text: list[int], seed: int = 0) -> Tensor:
    """Logits of all of a text's tokens, computed at once."""
    [logits] = Sequences(decoder, 1, PROMPT + 50, seed).step([(0, text)])
    return logits


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3"])
def test_a_step_equals_that_of_plain_torch(shape: str, dtype: str, tolerance: float) -> None:
    ours = native(dtype, shape)
    theirs = Decoder(ours.config, ours.weights)
    prompts = [tokens(count, seed=count) for count in (1, 5, 64, PROMPT)]
    for decode in (False, True):
        runs = []
        for decoder in (ours, theirs):
            run = Sequences(decoder, 4, PROMPT + 50)
            logits = run.step(list(enumerate(prompts)))
            runs.append(run.step([(i, [7]) for i in range(4)]) if decode else logits)
        for mine, torchs in zip(*runs, strict=True):
            torch.testing.assert_close(mine, torchs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_the_same_to_the_last_bit_in_any_batch_chunking_and_layout(dtype: str) -> None:
    decoder = native(dtype)
    text = tokens(PROMPT, seed=1)
    expected = alone(decoder, text)
    assert torch.equal(alone(decoder, text, seed=5), expected)
    for chunk in (1, 7, 64, 149):
        run = Sequences(decoder, 9, PROMPT + 50, seed=chunk)
        parts = []
        for start in range(0, PROMPT, chunk):
            others = [(i, tokens(1 + (i * start) % 11, seed=i)) for i in range(1, 9) if run.lengths[i] < 150]
            *_, part = run.step([*others, (0, text[start : start + chunk])])
            parts.append(part)
        assert torch.equal(torch.cat(parts), expected), chunk


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(dtype: str) -> None:
    decoder, before = native(dtype), torch.get_num_threads()
    text = tokens(PROMPT, seed=2)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(alone(decoder, text))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_token_ids_outside_of_the_vocabulary_are_refused_before_they_are_read() -> None:
    decoder = native("float32")
    for token in (-1, 512, 2**40):
        with pytest.raises(IndexError, match=r"0 \.\. 511"):
            alone(decoder, [1, token, 2])


def test_contexts_beyond_the_first_table_of_rotations_go_on_as_before() -> None:
    decoder = native("float32")
    config = dataclasses.replace(decoder.config, max_position_embeddings=8192)
    text = tokens(2100, seed=3)
    [at_once] = Sequences(decoder, 1, 2200).step([(0, text)])
    [plain] = Sequences(Decoder(config, decoder.weights), 1, 2200).step([(0, text)])
    torch.testing.assert_close(at_once, plain, rtol=2e-5, atol=2e-5)


WANTED_OF_81 = ([80], [0, 1, 2], [3, 40, 60, 80], [79, 3, 3, 0], [], list(range(81)))
WANTED_OF_5 = ([4], [0, 1, 2, 3], [3, 3, 0], [], list(range(5)))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "cases"),
    [((1, 1, 1, 57, 21), WANTED_OF_81), ((1, 1, 1, 2), WANTED_OF_5)],
    ids=["many", "few"],
)
def test_rows_that_are_asked_for_are_those_of_all_rows(
    window: int | None, dtype: str, lengths: tuple[int, ...], cases: tuple[list[int], ...]
) -> None:
    whole = native(dtype)
    config = dataclasses.replace(whole.config, windows=(None, window))
    library = native_library()
    assert library is not None
    decoder = NativeDecoder(config, whole.weights, library)
    run = Sequences(decoder, len(lengths), PROMPT)
    run.step([(0, tokens(60, seed=1))])
    for other in (1, 2):  # decodes over shared keys are computed together
        run.share_prefix(0, other, 3)
    work = [(index, tokens(count, seed=index)) for index, count in enumerate(lengths)]
    everything = run.hidden(work)
    for rows in cases:
        run.take_back(work)
        wanted = torch.tensor(rows, dtype=torch.int64)
        assert torch.equal(run.hidden(work, wanted), everything[wanted]), rows


def test_a_step_without_wanted_logits_computes_none() -> None:
    decoder = native("float32")
    with torch.inference_mode():
        assert decoder.logits(torch.empty(0, decoder.config.hidden_size)).shape == (0, 512)


def test_logits_of_a_later_step_take_no_memory_of_their_own() -> None:
    decoder = native("float32")
    hidden = torch.randn(3, decoder.config.hidden_size, generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        before = decoder.logits(hidden)
        expected = before.clone()
        later = decoder.logits(hidden[1:])
    assert later.data_ptr() == before.data_ptr()
    assert torch.equal(later, expected[1:])


def test_whole_steps_on_matrix_tiles_equal_plain_torch(tmp_path: Path) -> None:
    own = native("bfloat16")
    library = open_library(build(tmp_path, ["-march=native", "-DSFLLM_EMULATE_AMX"]))
    assert library.sfllm_uses_tiles(s.BFLOAT16)
    tiled = NativeDecoder(own.config, own.weights, library)
    text = tokens(PROMPT, seed=4)
    plain = alone(Decoder(own.config, own.weights), text)
    torch.testing.assert_close(alone(tiled, text), plain, rtol=0.05, atol=0.05)
