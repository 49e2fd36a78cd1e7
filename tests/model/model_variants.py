"""The models that the decoder is compared on: one line for each thing a family or option changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    # Far larger than trained weights, so that attention is sharp and an error in it is visible.
    "initializer_range": 0.3,
}


@dataclass(frozen=True)
class Variant:
    """A tiny model of transformers: `family` names its configuration class, `options` add to `TINY`."""

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    reference: Literal["whole", "stepwise"] = "whole"
    """Whether transformers sees a text at once or token by token, where that makes a difference to it."""
    shortest: int = 1
    """The shortest prompt for which the comparison holds."""
    context_length: int | None = None
    """What is passed on to `load_model`."""
    old_spelling: bool = False
    """Whether `config.json` is written as transformers 4 did: without what follows from other fields."""


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **options}}


def longrope(original: int) -> dict[str, Any]:
    """Phi-3's scaling; four frequencies are half of a head of 16 channels, in pairs."""
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.2, 2.0, 5.0, 11.0]}
    parameters = {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.5, **factors}
    return {"original_max_position_embeddings": original, "rope_parameters": parameters}


LLAMA3_ROPE = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
WIDE = {"head_dim": 16}
PHI3 = {"pad_token_id": 0, "hidden_size": 96, "initializer_range": 0.2}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "pad_token_id": 0}
GEMMA2 = {**GEMMA, "sliding_window": 6, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 20.0}
GEMMA3 = {**GEMMA, "sliding_window": 5, "num_hidden_layers": 4}
GEMMA3_PATTERN = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

BUILT_IN: dict[str, Variant] = {
    "llama": Variant("Llama", {"tie_word_embeddings": False}),
    "llama-tied": Variant("Llama", {"tie_word_embeddings": True}),
    "llama-biased": Variant("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": Variant("Llama", WIDE),
    "llama-gelu": Variant("Llama", {"hidden_act": "gelu"}),
    "llama3-rope": Variant("Llama", rope("llama3", **LLAMA3_ROPE), old_spelling=True),
    "llama-linear-rope": Variant("Llama", rope("linear", factor=3.0), old_spelling=True),
    "llama-yarn": Variant("Llama", rope("yarn", **YARN), old_spelling=True),
    "llama-yarn-untruncated": Variant("Llama", rope("yarn", **YARN, beta_fast=16, truncate=False)),
    "llama-yarn-mscale": Variant("Llama", rope("yarn", **YARN, mscale=1.2, mscale_all_dim=0.7)),
    "llama-dynamic-rope": Variant(
        "Llama", {"max_position_embeddings": 24, **rope("dynamic", factor=4.0)}, reference="stepwise"
    ),
    "mistral": Variant("Mistral", {"sliding_window": None}),
    "mistral-window": Variant("Mistral", {"sliding_window": 8}, old_spelling=True),
    "mistral-window-of-one": Variant("Mistral", {"sliding_window": 1}),
    "qwen2": Variant("Qwen2"),
    "qwen2-window": Variant(
        "Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, old_spelling=True
    ),
    "qwen3": Variant("Qwen3", {**WIDE, "tie_word_embeddings": False}),
    "qwen3-tied": Variant("Qwen3", {**WIDE, "tie_word_embeddings": True}),
    "qwen3-biased": Variant("Qwen3", {**WIDE, "attention_bias": True}),
    "qwen3-layer-types": Variant(
        "Qwen3", {**WIDE, "use_sliding_window": True, "sliding_window": 12, "layer_types": MIXED}
    ),
    "qwen3-yarn": Variant("Qwen3", {**WIDE, **rope("yarn", **YARN, attention_factor=0.9)}, old_spelling=True),
    "phi3": Variant("Phi3", PHI3),
    "phi3-window": Variant("Phi3", {**PHI3, "sliding_window": 7}),
    "phi3-partial-rotary": Variant(
        "Phi3",
        {**PHI3, **rope("default", partial_rotary_factor=0.5), "tie_word_embeddings": True},
        old_spelling=True,
    ),
    "phi3-longrope": Variant("Phi3", {**PHI3, **longrope(8)}, shortest=9, old_spelling=True),
    "phi3-longrope-short": Variant("Phi3", {**PHI3, **longrope(128)}, context_length=128),
    "smollm3": Variant("SmolLM3", {"num_hidden_layers": 5, "pad_token_id": 0}, old_spelling=True),
    "smollm3-window": Variant(
        "SmolLM3",
        {
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 10,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
    ),
    "gemma2": Variant("Gemma2", GEMMA2, old_spelling=True),
    "gemma2-uncapped": Variant(
        "Gemma2", {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    ),
    "gemma3": Variant("Gemma3Text", {**GEMMA3, "num_hidden_layers": 6}, old_spelling=True),
    "gemma3-old-linear-rope": Variant(
        "Gemma3Text",
        {
            **GEMMA3,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        old_spelling=True,
    ),
    "gemma3-layer-types": Variant(
        "Gemma3Text", {**GEMMA3, "layer_types": GEMMA3_PATTERN, "final_logit_softcapping": 25.0}
    ),
    "gemma3-linear-rope": Variant(
        "Gemma3Text",
        {
            **GEMMA3,
            "layer_types": GEMMA3_PATTERN,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
}
"""Families of the decoder."""

PARALLEL = {"num_key_value_heads": 6, "pad_token_id": 0}

THROUGH_TRANSFORMERS: dict[str, Variant] = {
    "olmo2": Variant("Olmo2", {"pad_token_id": 0}),
    "gpt-neox": Variant("GPTNeoX", PARALLEL),
    "granite": Variant(
        "Granite", {"logits_scaling": 3.0, "attention_multiplier": 0.4, "embedding_multiplier": 2.0}
    ),
    "starcoder2": Variant("Starcoder2", {"sliding_window": 11, "tie_word_embeddings": True}),
    "gpt2": Variant("GPT2", {**PARALLEL, "activation_function": "gelu_new"}),
    "mixtral": Variant("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
}
"""Architectures that only transformers knows."""

VARIANTS = {**BUILT_IN, **THROUGH_TRANSFORMERS}
