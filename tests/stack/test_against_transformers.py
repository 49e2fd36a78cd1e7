"""What comes out of HTTP is what transformers generates from the same file in float32."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import gguf
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

CONVERSATIONS = [
    [{"role": "user", "content": "Name three colours of the rainbow."}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Because air scatters blue light."},
        {"role": "user", "content": "And at sunset? Ça va être différent 🌅?"},
    ],
    [{"role": "user", "content": "Write a haiku about rivers. " * 12}],
]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def expected(smollm2_gguf: Path) -> list[str]:
    """The greedy answers of transformers, which reads the file, its tokenizer and template by itself."""
    directory, file = smollm2_gguf.parent, smollm2_gguf.name
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(directory, gguf_file=file)
    field = gguf.GGUFReader(smollm2_gguf).get_field("tokenizer.chat_template")
    assert field is not None
    tokenizer.chat_template = field.contents()
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    answers = []
    for conversation in CONVERSATIONS:
        prompt = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def ask(client: openai.OpenAI, model: str, conversation: list[dict[str, str]]) -> str:
    answer = client.chat.completions.create(
        model=model, messages=conversation, temperature=0, max_tokens=NEW_TOKENS
    )
    return answer.choices[0].message.content or ""


def test_a_greedy_chat_is_word_for_word_that_of_transformers(
    client: openai.OpenAI, model: str, expected: list[str]
) -> None:
    assert [ask(client, model, conversation) for conversation in CONVERSATIONS] == expected


def test_it_stays_so_when_conversations_share_batches(
    client: openai.OpenAI, model: str, expected: list[str]
) -> None:
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda c: ask(client, model, c), CONVERSATIONS * 4))
    assert answers == expected * 4
