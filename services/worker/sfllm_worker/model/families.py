"""The architectures that the decoder knows, and which of their layers attend to a window only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sfllm_worker.model.errors import ModelLoadError
from sfllm_worker.model.fields import integer

FULL, SLIDING = "full_attention", "sliding_attention"

Windows = Literal["none", "all", "upper", "unrotated", "gemma2", "gemma3"]
"""Which layers slide where `layer_types` does not say: none, all when there is a window, those from
`max_window_layers` on, those without rotation, every other one, or five of six."""


@dataclass(frozen=True)
class Family:
    """How an architecture differs from plain Llama, where `config.json` does not say it itself."""

    model_type: str
    name: str
    """What people call the models."""
    qk_norm: bool = False
    default_head_dim: int | None = None
    ties_embeddings: bool = False
    """Whether the head shares the embedding when the configuration does not say."""
    biases: Literal["configured", "qkv", "none"] = "configured"
    """Biases of attention: as `attention_bias` says, always and only on queries, keys and values, or none."""
    windows: Windows = "none"
    fused: bool = False
    """Whether checkpoints hold `qkv_proj` and `gate_up_proj`, where others hold their parts."""
    partial_rotary: bool = False
    """Whether `partial_rotary_factor` may rotate only the first channels of a head."""
    no_rope_layers: bool = False
    """Whether some layers go without rotation."""
    rope_theta: float = 10000.0
    local_rope_theta: float | None = None
    """The rotary base of sliding layers, where it is another one."""
    gemma: bool = False
    """Gemma's ways: norms before and after attention and feed-forward whose stored weights lack the one
    they are centred on, embeddings scaled by the root of their size, `query_pre_attn_scalar`, soft caps."""
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", "Llama 2, Llama 3, SmolLM2"),
    "MistralForCausalLM": Family("mistral", "Mistral", biases="none", windows="all"),
    "Qwen2ForCausalLM": Family("qwen2", "Qwen2, Qwen2.5", biases="qkv", windows="upper"),
    "Qwen3ForCausalLM": Family("qwen3", "Qwen3", qk_norm=True, default_head_dim=128, windows="upper"),
    "Phi3ForCausalLM": Family(
        "phi3", "Phi-3, Phi-3.5, Phi-4", biases="none", windows="all", fused=True, partial_rotary=True
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        "SmolLM3",
        ties_embeddings=True,
        windows="unrotated",
        no_rope_layers=True,
        rope_theta=2000000.0,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        "Gemma 2",
        default_head_dim=256,
        ties_embeddings=True,
        windows="gemma2",
        gemma=True,
        attention_soft_cap=50.0,
        final_soft_cap=30.0,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        "Gemma 3 (text)",
        qk_norm=True,
        default_head_dim=256,
        ties_embeddings=True,
        windows="gemma3",
        rope_theta=1000000.0,
        local_rope_theta=10000.0,
        gemma=True,
    ),
}
"""By the name in `architectures`."""


def find_family(raw: Mapping[str, Any]) -> tuple[str, Family] | None:
    """Architecture and family of a `config.json`, or None when the decoder does not know it."""
    names = raw.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return name, FAMILIES[name]
    if not names:
        for name, family in FAMILIES.items():
            if raw.get("model_type") == family.model_type:
                return name, family
    return None


def rotated_layers(raw: Mapping[str, Any], family: Family, count: int) -> tuple[bool, ...]:
    """Whether each layer rotates queries and keys."""
    if not family.no_rope_layers:
        return (True,) * count
    flags = raw.get("no_rope_layers")
    if flags is None:
        interval = integer(raw, "no_rope_layer_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(count))
    if not isinstance(flags, list) or len(flags) < count:
        raise ModelLoadError(f"config field no_rope_layers must be a list of {count} flags, not {flags!r}")
    return tuple(bool(flag) for flag in flags[:count])


def layer_types(raw: Mapping[str, Any], family: Family, count: int) -> tuple[str, ...]:
    """Each layer's kind, `FULL` or `SLIDING`. Raises `ModelLoadError` for kinds that are not supported."""
    kinds = raw.get("layer_types")
    if family.windows == "none" and raw.get("use_sliding_window"):
        raise ModelLoadError("unsupported option: use_sliding_window")
    if kinds is None or family.windows == "all":
        slides = _sliding_by_default(raw, family, count)
        return tuple(SLIDING if slide else FULL for slide in slides)
    supported = (FULL,) if family.windows == "none" else (FULL, SLIDING)
    other = sorted(set(kinds) - set(supported))
    if other:
        raise ModelLoadError(
            f"unsupported layer_types: {', '.join(other)} (supported: {', '.join(supported)})"
        )
    if len(kinds) != count:
        raise ModelLoadError(f"config field layer_types must name {count} layers, not {len(kinds)}")
    return tuple(kinds)


def _sliding_by_default(raw: Mapping[str, Any], family: Family, count: int) -> list[bool]:
    windowed = raw.get("sliding_window") is not None
    switched_on = windowed and bool(raw.get("use_sliding_window"))
    layers = range(count)
    match family.windows:
        case "none":
            return [False] * count
        case "all":
            return [windowed] * count
        case "upper":
            first = integer(raw, "max_window_layers", 28)
            return [switched_on and i >= first for i in layers]
        case "unrotated":
            return [switched_on and not rotated for rotated in rotated_layers(raw, family, count)]
        case "gemma2":
            return [i % 2 == 0 for i in layers]
        case "gemma3":
            pattern = integer(raw, "sliding_window_pattern", 6)
            return [(i + 1) % pattern != 0 for i in layers]
