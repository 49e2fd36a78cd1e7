from __future__ import annotations

from typing import Any

import pytest

from sfllm_worker.load import ModelLoadError
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.rope_config import LinearScaling, LongRopeScaling, Rope

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": [2, 3, 2],
}


def test_fields_of_a_llama_config_are_read() -> None:
    config = ModelConfig.from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (2, 16, 1e-5)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 3))
    assert not config.qk_norm


def test_qwen3_norms_queries_and_keys_and_has_its_own_head_size() -> None:
    config = ModelConfig.from_hf({**LLAMA, "architectures": ["Qwen3ForCausalLM"]})
    assert config.qk_norm
    assert config.head_dim == 128


def test_the_model_type_stands_in_for_missing_architectures() -> None:
    raw = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert ModelConfig.from_hf({**raw, "model_type": "llama"}).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    ],
)
def test_rope_options_are_read_in_old_and_new_spelling(spelling: dict[str, Any]) -> None:
    config = ModelConfig.from_hf({**LLAMA, **spelling})
    assert set(config.ropes) == {Rope(5000.0, 16, LinearScaling(2.0))}


@pytest.mark.parametrize("null", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_absent_rope_scaling_is_none(null: dict[str, Any]) -> None:
    assert set(ModelConfig.from_hf({**LLAMA, **null}).ropes) == {Rope(10000.0, 16)}


def test_scaled_positions_cover_more_tokens_than_the_model_was_trained_on() -> None:
    def longest(**scaling: Any) -> int:
        return ModelConfig.from_hf({**LLAMA, "rope_scaling": scaling}).max_context_length

    assert longest(type="dynamic", factor=4.0) == 2048
    assert longest(type="yarn", factor=4.0, original_max_position_embeddings=256) == 1024
    assert longest(type="yarn", factor=1.5, original_max_position_embeddings=256) == 512
    assert longest(type="linear", factor=4.0) == 512


PHI3: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Phi3ForCausalLM"],
    "original_max_position_embeddings": 128,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}


@pytest.mark.parametrize(
    ("served", "factor", "longest"), [(None, 2.0, 512), (129, 2.0, 512), (128, 1.0, 128)]
)
def test_the_context_that_is_served_chooses_between_short_and_long_factors(
    served: int | None, factor: float, longest: int
) -> None:
    config = ModelConfig.from_hf(PHI3, context_length=served)
    assert config.max_context_length == longest
    scaling = config.ropes[0] and config.ropes[0].scaling
    assert isinstance(scaling, LongRopeScaling)
    assert set(scaling.factors) == {factor}


GEMMA3: dict[str, Any] = {"architectures": ["Gemma3ForCausalLM"], "head_dim": 16, "sliding_window": 5}


def test_gemma3_as_older_files_spell_it_has_a_base_for_each_kind_of_layer() -> None:
    scaling = {"type": "linear", "factor": 8.0}
    old = {"rope_theta": 4000.0, "rope_local_base_freq": 300.0, "rope_scaling": scaling}
    layers = {"num_hidden_layers": 4, "sliding_window_pattern": 2}
    config = ModelConfig.from_hf({**LLAMA, **GEMMA3, **old, **layers})
    local, everywhere = Rope(300.0, 16), Rope(4000.0, 16, LinearScaling(8.0))
    assert config.ropes == (local, everywhere, local, everywhere)
    assert config.windows == (5, None, 5, None)
    assert config.tie_word_embeddings


def test_windows_stay_off_unless_they_are_switched_on() -> None:
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "max_window_layers": 1}
    assert ModelConfig.from_hf(qwen).windows == (None, None)
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": True}).windows == (None, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM, Mistral"),
        ({"architectures": None}, "none named"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope scaling: proportional .*yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window must be positive"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}, "no_rope_layers .* 2 flags"),
        ({"architectures": ["Gemma2ForCausalLM"]}, "sliding_window must be an integer"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "bidirectional"),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"]}, "2 layers, not 1"),
        ({**PHI3, "rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "8 numbers, not 1"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor must be a number"),
        ({"hidden_size": None}, "hidden_size must be an integer"),
        ({"vocab_size": "many"}, "vocab_size must be an integer"),
        ({"num_hidden_layers": 0}, "num_layers must be positive"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ({"hidden_act": "relu2"}, "hidden_act: relu2"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"head_dim": 15}, "head_dim must be even"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        ModelConfig.from_hf({**LLAMA, **change})
