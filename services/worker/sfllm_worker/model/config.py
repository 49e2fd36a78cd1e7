"""What a decoder needs to know about a model, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sfllm_worker.model.errors import ModelLoadError
from sfllm_worker.model.families import FAMILIES, SLIDING, Family, find_family, layer_types
from sfllm_worker.model.fields import integer, number, optional_id, optional_number, token_ids
from sfllm_worker.model.layers import ACTIVATIONS
from sfllm_worker.model.rope_config import Rope, layer_ropes


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
    activation: str = "silu"
    rms_norm_eps: float = 1e-6
    ropes: tuple[Rope | None, ...] = ()
    """Each layer's rotary embedding, None for a layer without; empty stands for all without."""
    windows: tuple[int | None, ...] = ()
    """How many of the newest tokens each layer attends to, itself included; None or empty means all."""
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_projections: bool = False
    """Whether stored weights have queries, keys and values, and gate and up, as one tensor each."""
    sandwich_norms: bool = False
    """Whether attention and feed-forward are normed after as well as before."""
    unit_offset_norms: bool = False
    """Whether stored norm weights lack the one that they are centred on."""
    embedding_scale: float | None = None
    attention_scale: float | None = None
    """What scores are multiplied by; None is `head_dim ** -0.5`."""
    attention_soft_cap: float | None = None
    """Scores `s` become `cap * tanh(s / cap)`."""
    final_soft_cap: float | None = None
    """The same for logits."""
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
        for name in ("ropes", "windows"):
            if not getattr(self, name):
                object.__setattr__(self, name, (None,) * self.num_layers)
            if len(getattr(self, name)) != self.num_layers:
                raise ModelLoadError(f"{name} must have an entry for each of {self.num_layers} layers")

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def max_context_length(self) -> int:
        """Tokens of a sequence that the positions cover, with their scaling."""
        lengths = [rope.max_length(self.max_position_embeddings) for rope in self.ropes if rope is not None]
        # Scaling of one kind of layer stretches the model: the other kind sees a window only.
        return max(lengths, default=self.max_position_embeddings)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], context_length: int | None = None) -> ModelConfig:
        """Read the contents of a `config.json`, as written by transformers 4 or 5.

        `context_length` is the longest context that will be served, or None for all the model has; only
        LongRoPE depends on it. Raises `ModelLoadError` for an unsupported architecture or option and for
        missing fields.
        """
        architecture, family = _family(raw)
        refuse_quantized(raw)
        hidden = integer(raw, "hidden_size")
        heads = integer(raw, "num_attention_heads")
        layers = integer(raw, "num_hidden_layers")
        head_dim = integer(raw, "head_dim", family.default_head_dim or hidden // max(heads, 1))
        kinds = layer_types(raw, family, layers)
        bias = family.biases == "configured" and bool(raw.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=integer(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer(raw, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=integer(raw, "num_key_value_heads", heads),
            head_dim=head_dim,
            activation=_activation(raw, family),
            rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
            ropes=layer_ropes(raw, family, head_dim, kinds, context_length),
            windows=_windows(raw, kinds),
            max_position_embeddings=integer(raw, "max_position_embeddings", 2048),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", family.ties_embeddings)),
            attention_bias=bias or family.biases == "qkv",
            attention_output_bias=bias,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            fused_projections=family.fused,
            bos_token_id=optional_id(raw, "bos_token_id"),
            eos_token_ids=token_ids(raw.get("eos_token_id")),
            **(_gemma_options(raw, family, hidden) if family.gemma else {}),
        )


def refuse_quantized(raw: Mapping[str, Any]) -> None:
    """Quantized checkpoints other than GGUF are not supported; misreading them must not pass."""
    options = raw.get("quantization_config")
    if options:
        method = options.get("quant_method", "unnamed") if isinstance(options, Mapping) else "unnamed"
        raise ModelLoadError(
            f"unsupported quantization_config: {method} (supported: unquantized weights, GGUF)"
        )


def _family(raw: Mapping[str, Any]) -> tuple[str, Family]:
    found = find_family(raw)
    if found is None:
        names = ", ".join(map(str, raw.get("architectures") or [])) or raw.get("model_type") or "none named"
        raise ModelLoadError(f"unsupported architecture: {names} (supported: {', '.join(FAMILIES)})")
    return found


def _activation(raw: Mapping[str, Any], family: Family) -> str:
    name = raw.get("hidden_activation" if family.gemma else "hidden_act")
    if name is None:
        name = "gelu_pytorch_tanh" if family.gemma else "silu"
    if name not in ACTIVATIONS:
        raise ModelLoadError(f"unsupported hidden_act: {name} (supported: {', '.join(ACTIVATIONS)})")
    return str(name)


def _windows(raw: Mapping[str, Any], kinds: tuple[str, ...]) -> tuple[int | None, ...]:
    if SLIDING not in kinds:
        return (None,) * len(kinds)
    window = integer(raw, "sliding_window")
    if window < 1:
        raise ModelLoadError(f"sliding_window must be positive, not {window}")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _gemma_options(raw: Mapping[str, Any], family: Family, hidden: int) -> dict[str, Any]:
    """Options that only Gemma's checkpoints use; null soft caps switch them off."""
    if raw.get("use_bidirectional_attention"):
        raise ModelLoadError("unsupported option: use_bidirectional_attention")
    caps = {
        "attention_soft_cap": ("attn_logit_softcapping", family.attention_soft_cap),
        "final_soft_cap": ("final_logit_softcapping", family.final_soft_cap),
    }
    return {
        "sandwich_norms": True,
        "unit_offset_norms": True,
        "embedding_scale": hidden**0.5,
        "attention_scale": number(raw, "query_pre_attn_scalar", 256.0) ** -0.5,
        **{ours: optional_number(raw, key) if key in raw else cap for ours, (key, cap) in caps.items()},
    }
