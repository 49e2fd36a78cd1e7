"""Reads single fields of a model's `config.json`, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfllm_worker.model.errors import ModelLoadError


def integer(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """An integer field; null counts as absent. Raises `ModelLoadError` for anything else."""
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelLoadError(f"config field {name} must be an integer, not {value!r}")
    return value


def number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A number field as float; null counts as absent. Raises `ModelLoadError` for anything else."""
    value = optional_number(raw, name)
    if value is None:
        value = default
    if value is None:
        raise ModelLoadError(f"config field {name} must be a number, not None")
    return float(value)


def optional_number(raw: Mapping[str, Any], name: str) -> float | None:
    """A number field as float, or None when it is absent or null."""
    value = raw.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ModelLoadError(f"config field {name} must be a number, not {value!r}")
    return float(value)


def numbers(raw: Mapping[str, Any], name: str, count: int) -> tuple[float, ...]:
    """A list field of exactly `count` numbers."""
    values = raw.get(name)
    if not isinstance(values, list) or not all(isinstance(value, (int, float)) for value in values):
        raise ModelLoadError(f"config field {name} must be a list of numbers")
    if len(values) != count:
        raise ModelLoadError(f"config field {name} must hold {count} numbers, not {len(values)}")
    return tuple(float(value) for value in values)


def optional_id(raw: Mapping[str, Any], name: str) -> int | None:
    """A token id, or None when the field holds no single one."""
    value = raw.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def token_ids(value: object) -> tuple[int, ...]:
    """The ids in an `eos_token_id`, which may be absent, one integer or a list of integers."""
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    for item in items:
        if not isinstance(item, int) or isinstance(item, bool):
            raise ModelLoadError(f"eos_token_id must be an integer or a list of integers, not {value!r}")
    return tuple(dict.fromkeys(items))
