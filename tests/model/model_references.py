"""Tiny checkpoints written by transformers, and runs of the decoder to compare with its."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load.dummy import byte_tokenizer
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.model.decoder import Decoder

BLOCK = 4
TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Far larger than trained weights, so that attention is sharp and an error in it is visible.
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16}),
    "llama3-rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biased": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "attention_bias": True}),
}


def make_reference(variant: str, directory: Path, **save_options: Any) -> Any:
    """A seeded random model in float32, saved to `directory`; biases and norms are random too."""
    config_class, model_class, options = VARIANTS[variant]
    torch.manual_seed(7)
    model = model_class(config_class(**{**TINY, **options}, eos_token_id=2)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3)
        if name.endswith("norm.weight"):
            parameter.data.normal_(1, 0.2)
    model.save_pretrained(directory, **save_options)
    tokenizer = byte_tokenizer(model.config.vocab_size)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return model


@torch.inference_mode()
def reference_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """Logits float32 `[len(tokens), vocab]` of transformers."""
    logits: Tensor = model(torch.tensor([list(tokens)])).logits[0].float()
    return logits


def reference_greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Transformers' own greedy continuation, of exactly `count` tokens."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in output[0, len(prompt) :]]


class Sequences:
    """Sequences over one cache with scattered block tables, run step by step as an engine would."""

    def __init__(self, decoder: Decoder, num_sequences: int, max_tokens: int, seed: int = 0) -> None:
        self.decoder = decoder
        each = -(-max_tokens // BLOCK)
        blocks = torch.randperm(each * num_sequences, generator=torch.Generator().manual_seed(seed)) + 1
        self.tables: list[list[int]] = blocks.view(num_sequences, each).tolist()
        self.kv = KVCache(decoder.config, each * num_sequences + 1, BLOCK, decoder.dtype, decoder.device)
        self.lengths = [0] * num_sequences

    @torch.inference_mode()
    def step(self, work: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """Run `(sequence, its next tokens)` in one batch; logits `[tokens, vocab]` of each."""
        for index, tokens in work:
            self.lengths[index] += len(tokens)
        batch = AttentionBatch.build(
            [len(tokens) for _, tokens in work],
            [self.lengths[index] for index, _ in work],
            [self.tables[index] for index, _ in work],
            BLOCK,
            self.decoder.device,
        )
        flat = torch.tensor([token for _, tokens in work for token in tokens], device=self.decoder.device)
        hidden = self.decoder.forward(flat, batch.positions, batch, self.kv)
        logits = self.decoder.logits(hidden)
        return list(logits.split([len(tokens) for _, tokens in work]))

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Continue all prompts together, one prefill step and then decodes."""
        outputs: list[list[int]] = [[] for _ in prompts]
        work: list[tuple[int, Sequence[int]]] = list(enumerate(prompts))
        for _ in range(count):
            order = sorted(work, key=lambda item: len(item[1]) > 1)
            for (index, _), logits in zip(order, self.step(order), strict=True):
                outputs[index].append(int(logits[-1].argmax()))
            work = [(index, outputs[index][-1:]) for index in range(len(prompts))]
        return outputs
