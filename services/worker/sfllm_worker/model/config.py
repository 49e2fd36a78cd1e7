"""What a decoder needs to know about a model, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sfllm_worker.model.errors import ModelLoadError


@dataclass(frozen=True)
class Family:
    """How an architecture differs from plain Llama, where `config.json` does not say it itself."""

    model_type: str
    qk_norm: bool = False
    default_head_dim: int | None = None


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama"),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, default_head_dim=128),
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length of the original training.

    `kind` is "linear" (all frequencies divided by `factor`) or "llama3" (only low frequencies, with a
    smooth ramp between the two wavelength bounds).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a decoder-only transformer. All sizes are counts of elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        """Refuse shapes that no decoder can have, by the name of the field."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        for name in (*sizes, "num_kv_heads", "head_dim", "max_position_embeddings"):
            if getattr(self, name) <= 0:
                raise ModelLoadError(f"{name} must be positive, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ModelLoadError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read the contents of a `config.json`, as written by transformers 4 or 5.

        Raises `ModelLoadError` for an unsupported architecture or option and for missing fields.
        """
        architecture, family = _family(raw)
        _refuse_unsupported(raw)
        hidden = _integer(raw, "hidden_size")
        heads = _integer(raw, "num_attention_heads")
        scaling, theta = _rope(raw)
        bias = bool(raw.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=_integer(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_integer(raw, "intermediate_size"),
            num_layers=_integer(raw, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_integer(raw, "num_key_value_heads", heads),
            head_dim=_integer(raw, "head_dim", family.default_head_dim or hidden // max(heads, 1)),
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=_integer(raw, "max_position_embeddings", 2048),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bias,
            attention_output_bias=bias,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            bos_token_id=_optional_id(raw, "bos_token_id"),
            eos_token_ids=token_ids(raw.get("eos_token_id")),
        )


def token_ids(value: object) -> tuple[int, ...]:
    """The ids in an `eos_token_id`, which may be absent, one integer or a list of integers."""
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    for item in items:
        if not isinstance(item, int) or isinstance(item, bool):
            raise ModelLoadError(f"eos_token_id must be an integer or a list of integers, not {value!r}")
    return tuple(dict.fromkeys(items))


def _family(raw: Mapping[str, Any]) -> tuple[str, Family]:
    names = raw.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return name, FAMILIES[name]
    if not names:
        for name, family in FAMILIES.items():
            if raw.get("model_type") == family.model_type:
                return name, family
    found = ", ".join(map(str, names)) or raw.get("model_type") or "none named"
    raise ModelLoadError(f"unsupported architecture: {found} (supported: {', '.join(FAMILIES)})")


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Options that would change the result and that this decoder does not have must not be ignored."""
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelLoadError(f"unsupported hidden_act: {activation} (supported: silu)")
    other = sorted({kind for kind in raw.get("layer_types") or [] if kind != "full_attention"})
    if other:
        raise ModelLoadError(f"unsupported layer_types: {', '.join(other)} (supported: full_attention)")
    if raw.get("use_sliding_window"):
        raise ModelLoadError("unsupported option: use_sliding_window")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unnamed")
        raise ModelLoadError(
            f"unsupported quantization_config: {method} (supported: unquantized weights, GGUF)"
        )
    if _number(raw, "partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError("unsupported option: partial_rotary_factor other than 1")


def _rope(raw: Mapping[str, Any]) -> tuple[RopeScaling | None, float]:
    """Scaling and base, from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (4)."""
    options: Mapping[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(options, Mapping):
        raise ModelLoadError(f"rope_parameters must be an object, not {options!r}")
    theta = _number(options, "rope_theta", _number(raw, "rope_theta", 10000.0))
    kind = options.get("rope_type", options.get("type", "default"))
    if kind == "default":
        return None, theta
    if kind == "linear":
        return RopeScaling("linear", _number(options, "factor")), theta
    if kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            _number(options, "factor"),
            _number(options, "low_freq_factor"),
            _number(options, "high_freq_factor"),
            _integer(options, "original_max_position_embeddings"),
        )
        return scaling, theta
    raise ModelLoadError(f"unsupported rope scaling: {kind} (supported: default, linear, llama3)")


def _integer(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelLoadError(f"config field {name} must be an integer, not {value!r}")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ModelLoadError(f"config field {name} must be a number, not {value!r}")
    return float(value)


def _optional_id(raw: Mapping[str, Any], name: str) -> int | None:
    value = raw.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
