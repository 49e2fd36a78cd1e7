"""The default model, read from its GGUF file, against transformers in float64.

Transformers' own float32 logits are off by up to 9e-5 here, which would be all of the tolerance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_references import Sequences, reference_greedy, reference_logits
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from sfllm_worker.load import LoadedModel, load_model

PROMPTS = (
    "The capital of France is",
    "Hi",
    "<|im_start|>user\nName three colours of the rainbow.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
)


@pytest.fixture(scope="module")
def loaded(smollm2_directory: Path) -> LoadedModel:
    return load_model(smollm2_directory, dtype="float32")


@pytest.fixture(scope="module")
def reference(smollm2_directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2_directory, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def prompts(loaded: LoadedModel) -> list[list[int]]:
    tokenizer = Tokenizer.from_str(loaded.assets["tokenizer.json"].decode())
    return [tokenizer.encode(text).ids for text in PROMPTS]


def test_logits_equal_those_of_transformers(
    loaded: LoadedModel, reference: Any, prompts: list[list[int]]
) -> None:
    for ids in prompts:
        [ours] = Sequences(loaded.decoder, 1, 64).step([(0, ids)])
        assert float((ours - reference_logits(reference, ids)).abs().max()) <= 1e-4


def test_greedy_tokens_of_a_batch_equal_those_of_transformers(
    loaded: LoadedModel, reference: Any, prompts: list[list[int]]
) -> None:
    ours = Sequences(loaded.decoder, len(prompts), 96).greedy(prompts, 16)
    assert ours == [reference_greedy(reference, ids, 16) for ids in prompts]


def test_chunks_among_decodes_give_the_logits_of_transformers(
    loaded: LoadedModel, reference: Any, prompts: list[list[int]]
) -> None:
    chat, code = prompts[2], prompts[3]
    run = Sequences(loaded.decoder, 2, 64)
    parts = [run.step([(0, chat[:7])])[0]]
    run.step([(1, code[:10])])
    for start in range(7, len(chat), 5):
        decode, chunk = run.step([(1, [code[10 + start // 5]]), (0, chat[start : start + 5])])
        assert decode.shape[0] == 1
        parts.append(chunk)
    assert float((torch.cat(parts) - reference_logits(reference, chat)).abs().max()) <= 1e-4


def test_the_file_was_read_into_a_model_that_knows_its_facts(
    loaded: LoadedModel, prompts: list[list[int]]
) -> None:
    [answer] = Sequences(loaded.decoder, 1, 32).greedy([prompts[0]], 3)
    tokenizer = Tokenizer.from_str(loaded.assets["tokenizer.json"].decode())
    assert "Paris" in tokenizer.decode(answer)


def test_weights_equal_those_that_transformers_reads_from_the_file(
    smollm2_gguf: Path, reference: Any
) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF files only with accelerate")
    from transformers import GgufConfig  # noqa: PLC0415 - missing in older releases of transformers

    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent,
        gguf_file=smollm2_gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    ours = dict(reference.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter.to(torch.float64), ours[name]), name


def test_bfloat16_chooses_mostly_the_same_tokens(
    loaded: LoadedModel, smollm2_directory: Path, prompts: list[list[int]]
) -> None:
    half = load_model(smollm2_directory, dtype="bfloat16")
    ids = prompts[2]
    [ours] = Sequences(half.decoder, 1, 64).step([(0, ids)])
    [exact] = Sequences(loaded.decoder, 1, 64).step([(0, ids)])
    assert float((ours.argmax(-1) == exact.argmax(-1)).float().mean()) > 0.8
