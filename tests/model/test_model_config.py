from __future__ import annotations

from typing import Any

import pytest

from sfllm_worker.load import ModelLoadError
from sfllm_worker.model.config import ModelConfig, RopeScaling

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
    assert config.rope_theta == 5000.0
    assert config.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize("null", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_absent_rope_scaling_is_none(null: dict[str, Any]) -> None:
    assert ModelConfig.from_hf({**LLAMA, **null}).rope_scaling is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM, Qwen3ForCausalLM"),
        ({"architectures": None}, "none named"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling: yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor must be a number"),
        ({"hidden_size": None}, "hidden_size must be an integer"),
        ({"vocab_size": "many"}, "vocab_size must be an integer"),
        ({"num_hidden_layers": 0}, "num_layers must be positive"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
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
