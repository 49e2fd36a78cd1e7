"""What travels with a model besides its weights: tokenizer, chat template, generation defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfllm_worker.model.errors import ModelLoadError
from sfllm_worker.model.fields import token_ids

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

_TOKEN_FIELDS = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAG_FIELDS = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces")


@dataclass(frozen=True)
class GenerationDefaults:
    """A model's own defaults for sampling; None where it has none."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> GenerationDefaults:
        """Read the contents of a `generation_config.json`; null counts as absent."""
        top_k = _number(raw, "top_k")
        return cls(
            temperature=_number(raw, "temperature"),
            top_p=_number(raw, "top_p"),
            top_k=None if top_k is None else int(top_k),
            min_p=_number(raw, "min_p"),
            repetition_penalty=_number(raw, "repetition_penalty"),
            eos_token_ids=token_ids(raw.get("eos_token_id")),
        )


def generation_defaults(directory: Path) -> GenerationDefaults:
    """The defaults in a directory's `generation_config.json`, or none when it has no such file."""
    path = directory / "generation_config.json"
    return GenerationDefaults.from_hf(read_json(path)) if path.is_file() else GenerationDefaults()


def model_assets(directory: Path) -> dict[str, bytes]:
    """The files a gateway needs to speak for a model, by name.

    `tokenizer.json` always, `tokenizer_config.json` reduced to what rendering and tokenizing need, and
    `chat_template.jinja` when the model has a template. Raises `ModelLoadError` without a tokenizer.
    """
    tokenizer = directory / TOKENIZER
    if not tokenizer.is_file():
        raise ModelLoadError(f"{directory} has no {TOKENIZER}")
    config_path = directory / TOKENIZER_CONFIG
    config = read_json(config_path) if config_path.is_file() else {}
    assets = {
        TOKENIZER: tokenizer.read_bytes(),
        TOKENIZER_CONFIG: json.dumps(reduced_tokenizer_config(config), ensure_ascii=False).encode(),
    }
    template = _chat_template(directory, config)
    if template is not None:
        assets[CHAT_TEMPLATE] = template.encode()
    return assets


def reduced_tokenizer_config(config: Mapping[str, Any]) -> dict[str, str | bool]:
    """The token strings and flags of a `tokenizer_config.json`; a token may be stored as an object."""
    reduced: dict[str, str | bool] = {}
    for name in _TOKEN_FIELDS:
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            reduced[name] = value
    for name in _FLAG_FIELDS:
        if isinstance(config.get(name), bool):
            reduced[name] = config[name]
    return reduced


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ModelLoadError`, naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    return value


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / CHAT_TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _number(raw: Mapping[str, Any], name: str) -> float | None:
    value = raw.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ModelLoadError(f"generation_config field {name} must be a number, not {value!r}")
    return float(value)
