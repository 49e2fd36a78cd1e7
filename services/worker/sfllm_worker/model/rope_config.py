"""Rotary embeddings as a `config.json` describes them: base, rotated channels and scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfllm_worker.model.errors import ModelLoadError
from sfllm_worker.model.families import FULL, SLIDING, Family, rotated_layers
from sfllm_worker.model.fields import integer, number, numbers, optional_number

SCALINGS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""Values of `rope_type` that are supported; "su" is an older name of "longrope"."""


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by `factor` (position interpolation, Chen et al., 2023)."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """NTK-aware scaling whose base grows with the length of the sequence beyond `original_length`.

    The length that counts for a token is its own position plus one, so that its key does not depend on
    what follows it, on chunks or on other sequences, and stays valid in a shared prefix.
    """

    factor: float
    original_length: int


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rule: only low frequencies are divided, with a ramp between two wavelength bounds."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): a ramp over channels, and cosines and sines times `attention_factor`."""

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., 2024): each frequency divided by its own number.

    Models bring two sets, for sequences up to the original length and for longer ones. One set holds for
    the whole life of a model here, because keys of both cannot be mixed; see `layer_ropes`.
    """

    factors: tuple[float, ...]
    attention_factor: float
    max_length: int
    """The longest sequence that the set is meant for."""


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a layer: base `theta` over the first `dim` channels of each head."""

    theta: float
    dim: int
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        """Channels are rotated in pairs."""
        if self.dim <= 0 or self.dim % 2:
            raise ModelLoadError(f"head_dim must be even for rotary embeddings, not {self.dim}")

    def max_length(self, max_position_embeddings: int) -> int:
        """Tokens of a sequence that the scaled positions cover."""
        match self.scaling:
            case DynamicScaling(factor, original) | YarnScaling(factor, original):
                return max(max_position_embeddings, int(original * factor))
            case LongRopeScaling(max_length=length):
                return length
        return max_position_embeddings


def layer_ropes(
    raw: Mapping[str, Any],
    family: Family,
    head_dim: int,
    kinds: Sequence[str],
    context_length: int | None = None,
) -> tuple[Rope | None, ...]:
    """The rotary embedding of each layer, or None for layers without; `kinds` are their layer types.

    Reads `rope_parameters` (transformers 5, also nested by layer type) or `rope_scaling` and `rope_theta`
    (4). `context_length` is the longest context that will be served, or None for all the model has: with
    LongRoPE it decides between the factors for short and for long contexts.
    """
    options: Any = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(options, Mapping):
        raise ModelLoadError(f"rope_parameters must be an object, not {options!r}")
    by_kind = {FULL: options, SLIDING: options}
    thetas = {kind: number(raw, "rope_theta", family.rope_theta) for kind in by_kind}
    if FULL in options or SLIDING in options:
        by_kind = {kind: options.get(kind) or {} for kind in by_kind}
    elif family.local_rope_theta is not None:
        by_kind[SLIDING] = {}
    if family.local_rope_theta is not None:
        thetas[SLIDING] = number(raw, "rope_local_base_freq", family.local_rope_theta)
    ropes = {
        kind: _rope(raw, family, by_kind[kind], thetas[kind], head_dim, context_length) for kind in set(kinds)
    }
    rotated = rotated_layers(raw, family, len(kinds))
    return tuple(ropes[kind] if rotates else None for kind, rotates in zip(kinds, rotated, strict=True))


def _rope(
    raw: Mapping[str, Any],
    family: Family,
    options: Mapping[str, Any],
    theta: float,
    head_dim: int,
    context_length: int | None,
) -> Rope:
    part = number(options, "partial_rotary_factor", number(raw, "partial_rotary_factor", 1.0))
    if part != 1.0 and not family.partial_rotary:
        raise ModelLoadError("unsupported option: partial_rotary_factor other than 1")
    dim = int(head_dim * part)
    scaling = _scaling(raw, family, options, dim, context_length)
    return Rope(number(options, "rope_theta", theta), dim, scaling)


def _scaling(
    raw: Mapping[str, Any], family: Family, options: Mapping[str, Any], dim: int, context_length: int | None
) -> RopeScaling | None:
    kind = options.get("rope_type", options.get("type", "default"))
    longest = integer(raw, "max_position_embeddings", 2048)
    # Where the original length stands on its own, as in Phi-3, it comes before the one in the options.
    original = integer(raw, "original_max_position_embeddings", _original_length(options, longest))
    if kind in ("su", "longrope") or (kind == "yarn" and family.partial_rotary):  # Phi-3's early name
        return _longrope(options, dim, longest, original, context_length)
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(number(options, "factor"))
        case "dynamic":
            return DynamicScaling(number(options, "factor"), longest)
        case "yarn":
            return _yarn(options, longest, original)
        case "llama3":
            low, high = number(options, "low_freq_factor"), number(options, "high_freq_factor")
            return Llama3Scaling(number(options, "factor"), low, high, original)
    raise ModelLoadError(f"unsupported rope scaling: {kind} (supported: {', '.join(SCALINGS)})")


def _original_length(options: Mapping[str, Any], default: int) -> int:
    return integer(options, "original_max_position_embeddings", default)


def _yarn(options: Mapping[str, Any], longest: int, original: int) -> YarnScaling:
    factor = number(options, "factor", longest / original)
    attention = optional_number(options, "attention_factor")
    if attention is None:
        scale, scale_all = optional_number(options, "mscale"), optional_number(options, "mscale_all_dim")
        if scale and scale_all:
            attention = _yarn_magnitude(factor, scale) / _yarn_magnitude(factor, scale_all)
        else:
            attention = _yarn_magnitude(factor, 1.0)
    return YarnScaling(
        factor,
        original,
        attention,
        number(options, "beta_fast", 32.0),
        number(options, "beta_slow", 1.0),
        truncate=bool(options.get("truncate", True)),
    )


def _yarn_magnitude(factor: float, scale: float) -> float:
    """The paper's correction of the attention's temperature."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(
    options: Mapping[str, Any], dim: int, longest: int, original: int, context_length: int | None
) -> LongRopeScaling:
    factor = number(options, "factor", longest / original)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short = longest <= original or (context_length is not None and context_length <= original)
    return LongRopeScaling(
        numbers(options, "short_factor" if short else "long_factor", dim // 2),
        number(options, "attention_factor", attention),
        min(longest, original) if short else longest,
    )
