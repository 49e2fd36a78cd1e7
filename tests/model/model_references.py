"""Tiny checkpoints written by transformers, and runs of the decoder to compare with its."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from model_variants import TINY, VARIANTS, Variant
from torch import Tensor

from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load.dummy import byte_tokenizer
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.model.decoder import TextModel

BLOCK = 4


def make_model(variant: Variant) -> Any:
    """A seeded random model in float32; biases and norms are random too."""
    config = getattr(transformers, f"{variant.family}Config")(**{**TINY, **variant.options})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    centre = 0.0 if variant.family.startswith("Gemma") else 1.0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3)
        elif parameter.ndim == 1:
            parameter.data.normal_(centre, 0.2)
    return model


def make_reference(name: str, directory: Path, **save_options: Any) -> Any:
    """The model of a variant, saved to `directory`."""
    model = make_model(VARIANTS[name])
    model.save_pretrained(directory, **save_options)
    if VARIANTS[name].old_spelling:
        path = directory / "config.json"
        path.write_text(json.dumps(in_old_spelling(json.loads(path.read_text()))))
    tokenizer = byte_tokenizer(model.config.vocab_size)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return model


def in_old_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` as transformers 4 wrote it."""
    derived = ("layer_types", "no_rope_layers", "rope_parameters", "dtype")
    old = {key: value for key, value in raw.items() if key not in derived}
    rope = raw["rope_parameters"]
    if "sliding_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    apart = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in (*apart, "rope_type")}
    scaling = {**scaling, "type": rope["rope_type"]} if scaling else None
    return {**old, **apart, "rope_scaling": scaling, "torch_dtype": raw["dtype"]}


@torch.inference_mode()
def reference_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """Logits float32 `[len(tokens), vocab]` of transformers."""
    logits: Tensor = model(torch.tensor([list(tokens)])).logits[0].float()
    return logits


@torch.inference_mode()
def stepwise_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """The same, one token at a time over transformers' cache."""
    cache, parts = transformers.DynamicCache(), []
    for token in tokens:
        output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        parts.append(output.logits[0].float())
    return torch.cat(parts)


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


Work = Sequence[tuple[int, Sequence[int]]]


class Sequences:
    """Sequences over one cache with scattered block tables, run step by step as an engine would."""

    def __init__(self, decoder: TextModel, num_sequences: int, max_tokens: int, seed: int = 0) -> None:
        self.decoder = decoder
        each = -(-max_tokens // BLOCK)
        blocks = torch.randperm(each * num_sequences, generator=torch.Generator().manual_seed(seed)) + 1
        self.tables: list[list[int]] = blocks.view(num_sequences, each).tolist()
        self.kv = KVCache(decoder.config, each * num_sequences + 1, BLOCK, decoder.dtype, decoder.device)
        self.lengths = [0] * num_sequences

    def share_prefix(self, source: int, target: int, num_blocks: int) -> None:
        """Let `target` start with the first blocks of `source`, as after a hit in a prefix cache."""
        self.tables[target][:num_blocks] = self.tables[source][:num_blocks]
        self.lengths[target] = num_blocks * BLOCK

    def step(self, work: Work) -> list[Tensor]:
        """Run `(sequence, its next tokens)` in one batch; logits `[tokens, vocab]` of each."""
        hidden = self.hidden(work)
        with torch.inference_mode():
            logits = self.decoder.logits(hidden).clone()  # they are valid until the next call
        return list(logits.split([len(tokens) for _, tokens in work]))

    @torch.inference_mode()
    def hidden(self, work: Work, rows: Tensor | None = None) -> Tensor:
        """The same step's final hidden rows, or those of them that are wanted."""
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
        return self.decoder.forward(flat, batch.positions, batch, self.kv, rows)

    def take_back(self, work: Work) -> None:
        """Let the same work come once more."""
        for index, tokens in work:
            self.lengths[index] -= len(tokens)

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
