"""How a stored model makes embeddings, where it says so.

sentence-transformers writes down a chain of modules (`modules.json`): the model, how its rows are pooled
(`1_Pooling/config.json`), and whether the result is normalized.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sfllm.messages import Pooling
from sfllm_worker.load.assets import read_json
from sfllm_worker.model.errors import ModelLoadError

MODULES = "modules.json"
FOLDER = "1_Pooling"
KINDS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}


def stored_pooling(directory: Path, dimensions: int) -> Pooling | None:
    """What the directory says of embeddings of so many dimensions, None without a word of it.

    Raises `ModelLoadError` for modules that cannot be read, and for those that would change the result:
    other ways to pool, and products after it.
    """
    path = directory / MODULES
    if not path.is_file():
        return None
    kind, normalizes = "", False
    for module in _modules(path):
        name = str(module.get("type", "")).rpartition(".")[2]
        if name == "Pooling":
            kind = _kind(directory / str(module.get("path", "")) / "config.json")
        elif name == "Normalize":
            normalizes = True
        elif name != "Transformer":
            raise ModelLoadError(f"{path}: embeddings with a module of type {name} are not supported")
    return Pooling(kind, dimensions, normalizes) if kind else None


def _modules(path: Path) -> list[dict[str, Any]]:
    try:
        modules = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelLoadError(f"{path} must hold a list of objects")
    return modules


def _kind(path: Path) -> str:
    modes = {
        name for name, value in read_json(path).items() if name.startswith("pooling_mode_") and value is True
    }
    if len(modes) != 1 or not modes <= KINDS.keys():
        raise ModelLoadError(
            f"{path}: only {' or '.join(KINDS)} is supported, got {', '.join(sorted(modes)) or 'none'}"
        )
    return KINDS[modes.pop()]


def write_pooling(directory: Path, kind: str) -> None:
    """Say the same of a model that was stored as something else; its embeddings are normalized."""
    (directory / FOLDER).mkdir()
    mode = next(name for name, value in KINDS.items() if value == kind)
    (directory / FOLDER / "config.json").write_text(json.dumps({mode: True}), encoding="utf-8")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": FOLDER, "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (directory / MODULES).write_text(json.dumps(modules, indent=2), encoding="utf-8")
