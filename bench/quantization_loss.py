"""What quantized weights lose, on a fixed text: perplexity and greedy agreement.

`python bench/quantization_loss.py` prints a table for the default model, `--model` for another GGUF file or
directory. Each way to run it reads the text in windows (teacher forcing) and continues the beginnings of
the windows greedily. Agreement is with bfloat16: the share of positions where the likeliest token is the
same, and how many tokens of a greedy continuation are equal before the first that differs.

A GGUF file of four-bit weights loses nothing to int8 or int4, which take them as they are. So for a GGUF
file the table also has rows `... rounded`: the file's weights in float32, quantized as those of a
safetensors checkpoint are.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sfllm.model_files import resolve_model
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load import LoadedModel, load_model
from sfllm_worker.load.gguf_cache import converted
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.model.decoder import TextModel

TEXT = Path(__file__).parent / "data" / "alice.txt"
"""The first chapter of Alice's Adventures in Wonderland (Lewis Carroll, 1865)."""
WINDOW = 512
PROMPT, CONTINUATION = 32, 48
BLOCK = 32


@dataclass(frozen=True)
class Reading:
    """What a model makes of the text."""

    loss: float
    """Mean negative log likelihood of a token, in nats."""
    likeliest: Tensor
    """int64: the token that it would choose at each position."""
    continuations: list[list[int]]

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss)

    def agreement(self, other: Reading) -> float:
        """Share of positions where both would choose the same token."""
        return float((self.likeliest == other.likeliest).double().mean())

    def equal_tokens(self, other: Reading) -> float:
        """Mean number of tokens of a continuation before the first that differs."""
        pairs = zip(self.continuations, other.continuations, strict=True)
        return sum(_common(*pair) for pair in pairs) / len(self.continuations)


def text_windows(model: LoadedModel, text: str) -> list[list[int]]:
    """The text's tokens in windows; what is left at the end is dropped."""
    ids = Tokenizer.from_str(model.assets["tokenizer.json"].decode()).encode(text).ids
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]


@torch.inference_mode()
def read(model: TextModel, windows: Sequence[Sequence[int]], continuation: int = CONTINUATION) -> Reading:
    """Read all windows, each from its own beginning."""
    losses, likeliest = [], []
    for window in windows:
        logits = _logits(model, _cache(model), window, 0)[:-1]
        targets = torch.tensor(window[1:])
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        likeliest.append(logits.argmax(-1))
    loss = float(torch.cat(losses).double().mean())
    continuations = [_continue(model, window[:PROMPT], continuation) for window in windows]
    return Reading(loss, torch.cat(likeliest), continuations)


def _continue(model: TextModel, prompt: Sequence[int], count: int) -> list[int]:
    kv, tokens, fresh = _cache(model), list(prompt), list(prompt)
    for _ in range(count):
        fresh = [int(_logits(model, kv, fresh, len(tokens) - len(fresh))[-1].argmax())]
        tokens += fresh
    return tokens[len(prompt) :]


def _logits(model: TextModel, kv: KVCache, tokens: Sequence[int], start: int) -> Tensor:
    blocks = [list(range(1, WINDOW // BLOCK + 1))]
    batch = AttentionBatch.build([len(tokens)], [start + len(tokens)], blocks, BLOCK)
    return model.logits(model.forward(torch.tensor(tokens), batch.positions, batch, kv))


def _cache(model: TextModel) -> KVCache:
    return KVCache(model.config, WINDOW // BLOCK + 1, BLOCK, model.dtype)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(first))


def ways(path: Path, scratch: Path) -> Iterator[tuple[str, LoadedModel]]:
    """The model in each way to run it, one at a time."""
    for dtype in ("bfloat16", "float32"):
        yield dtype, load_model(path, dtype=dtype)
    for quantization in ("int8", "int4"):
        yield quantization, load_model(path, dtype="bfloat16", quantization=quantization)
    if path.suffix == ".gguf":
        directory = converted(path, torch.float32, scratch)
        for quantization in ("int8", "int4"):
            model = load_model(directory, dtype="bfloat16", quantization=quantization)
            yield f"{quantization}, rounded", model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a GGUF file, a directory, or smollm2")
    parser.add_argument("--text", type=Path, default=TEXT)
    arguments = parser.parse_args()
    base: Reading | None = None
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in ways(resolve_model(arguments.model), Path(scratch)):
            windows = text_windows(model, arguments.text.read_text(encoding="utf-8"))
            reading = read(model.decoder, windows)
            if base is None:
                base = reading
                print(f"{len(windows)} windows of {WINDOW} tokens; continuations of {CONTINUATION}\n")
                print("| weights | MB | perplexity | same likeliest token | equal continuation |")
                print("|---|---|---|---|---|")
            print(
                f"| {name} | {model.weight_bytes / 1e6:.0f} | {reading.perplexity:.3f} "
                f"| {reading.agreement(base):.1%} | {reading.equal_tokens(base):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
