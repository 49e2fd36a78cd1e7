"""Models with random weights, for benchmarks and tests that need a shape rather than a language."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from sfllm_worker.load.assets import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, model_assets, read_json
from sfllm_worker.model.errors import ModelLoadError
from sfllm_worker.quant.weight import QuantizedWeight

_QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
_SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3-0.6b": _QWEN3_0_6B,
    "smollm2-135m": _SMOLLM2_135M,
    "tiny-llama": {**_TINY, "architectures": ["LlamaForCausalLM"]},
    "tiny-qwen3": {**_TINY, "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
}
"""Built-in shapes, as contents of a `config.json`."""

_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_POOL_SIZE = 1_000_003  # a prime, so that no row length divides it and rows of a weight differ
_STANDARD_DEVIATION = 0.02


class DummySource:
    """Seeded random tensors of any name, the same on every device; norms are ones and biases zeros.

    Values repeat from one pool, which takes milliseconds where drawing each of them would take seconds.
    """

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        pool = torch.empty(_POOL_SIZE).normal_(0, _STANDARD_DEVIATION, generator=generator)
        self._pool = pool.to(device, dtype)
        self._offset = 0

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the wanted shape; equal sequences of calls give equal tensors."""
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._pool.dtype, device=self._pool.device)
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=self._pool.dtype, device=self._pool.device)
        size = torch.Size(shape).numel()
        start, self._offset = self._offset, (self._offset + size) % _POOL_SIZE
        return self._pool.repeat(-(-(start + size) // _POOL_SIZE))[start : start + size].view(shape)

    def take_quantized(self, _name: str, _shape: tuple[int, int], /) -> QuantizedWeight | None:
        """None: random weights are quantized like those of a checkpoint."""
        return None


def dummy_config(path: str) -> dict[str, Any]:
    """The `config.json` of a directory, or of a built-in shape by name."""
    if path in SHAPES:
        return dict(SHAPES[path]) | {"bos_token_id": None, "eos_token_id": 256}
    if (Path(path) / "config.json").is_file():
        return read_json(Path(path) / "config.json")
    raise ModelLoadError(
        f"{path} is neither a directory with a config.json nor a built-in shape ({', '.join(SHAPES)})"
    )


def dummy_assets(path: str, vocab_size: int) -> dict[str, bytes]:
    """The directory's own tokenizer when it has one, else a byte-level one of the right size."""
    directory = Path(path)
    if path not in SHAPES and (directory / TOKENIZER).is_file():
        return model_assets(directory)
    config = {"eos_token": _SPECIALS[0], "pad_token": _SPECIALS[0], "add_bos_token": False}
    return {
        TOKENIZER: byte_tokenizer(vocab_size).to_str().encode(),
        TOKENIZER_CONFIG: json.dumps(config).encode(),
        CHAT_TEMPLATE: _TEMPLATE.encode(),
    }


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer with a token per byte, three special tokens, and filler words up to `vocab_size`.

    Fillers are never produced by encoding, but each decodes to a word of its own, so that whatever a
    random model generates gives text. Raises `ModelLoadError` for a vocabulary that cannot hold the bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *_SPECIALS]
    if vocab_size < len(words):
        raise ModelLoadError(f"a byte-level tokenizer needs a vocab_size of {len(words)}, not {vocab_size}")
    words += [f"Ġ{i}" for i in range(len(words), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in _SPECIALS])
    return tokenizer
