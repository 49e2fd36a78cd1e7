"""The default model in the forms that the servers read."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

from sfllm.model_files import resolve_model
from sfllm_worker.load.gguf_cache import converted


class Models(NamedTuple):
    """The published GGUF file, and a Hugging Face directory made from it in bfloat16."""

    gguf: Path
    directory: Path
    cache: Path

    @classmethod
    def prepare(cls, cache: Path) -> Models:
        """Fetch and convert what is not there yet."""
        gguf = resolve_model("smollm2")
        return cls(gguf, converted(gguf, torch.bfloat16), cache)

    def bf16_gguf(self, quantizer: Path) -> Path:
        """The weights in bfloat16 as a GGUF file, written by llama.cpp's own tool once."""
        target = self.cache / f"{self.gguf.stem}.BF16.gguf"
        if not target.is_file():
            part = target.with_suffix(".part")
            command = (str(quantizer), "--allow-requantize", str(self.gguf), str(part), "BF16", "1")
            subprocess.run(command, check=True, capture_output=True)
            part.rename(target)
        return target
