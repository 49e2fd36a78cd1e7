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

    published = "Q4_1"
    """The quantization of the published file."""

    @classmethod
    def prepare(cls, cache: Path) -> Models:
        """Fetch and convert what is not there yet."""
        gguf = resolve_model("smollm2")
        return cls(gguf, converted(gguf, torch.bfloat16), cache)

    def requantized(self, quantizer: Path, form: str) -> Path:
        """The weights as a GGUF file of that form (BF16, Q8_0, ..), written by llama.cpp's tool once.

        What the tool chooses by default, as a user would: in the forms of four bits the embedding, which is
        the output head too, has eight, as it has in the published file.
        """
        target = self.cache / f"{self.gguf.stem}.{form}.gguf"
        if not target.is_file():
            part = target.with_suffix(".part")
            command = (str(quantizer), "--allow-requantize", str(self.gguf), str(part), form, "1")
            subprocess.run(command, check=True, capture_output=True)
            part.rename(target)
        return target
