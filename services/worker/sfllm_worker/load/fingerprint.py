"""Identities of model files that are quick to compute."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from sfllm_worker.model.config import ModelConfig

_SAMPLE = 1 << 20
"""Bytes at both ends of a file that take part in its fingerprint."""


def file_fingerprint(path: Path) -> str:
    """A quick identity of a large file: its size and its first and last megabyte, hashed.

    The start holds the header, the end holds weights, and the size catches truncation; hashing gigabytes
    at every start would take longer than loading them. Only an edit of the middle alone that keeps the
    size goes unseen, which no training, conversion or quantization makes.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def directory_fingerprint(
    directory: Path, dtype: torch.dtype, config: ModelConfig, quantization: str = "none"
) -> str:
    """Identity of the model in a directory when run in `dtype`: its configuration, files and quantization.

    `config` takes part because keys also depend on what was made of the file, such as which of two sets
    of rotary factors is used.
    """
    digest = hashlib.sha256(repr((dtype, config.ropes, quantization)).encode())
    digest.update((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(path.name.encode())
        digest.update(file_fingerprint(path).encode())
    return digest.hexdigest()[:32]
