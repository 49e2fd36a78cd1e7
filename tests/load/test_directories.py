"""Loading Hugging Face directories, dummy models, and the files that travel to gateways."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load import LoadedModel, ModelLoadError, load_model
from sfllm_worker.load.assets import GenerationDefaults, model_assets, reduced_tokenizer_config
from sfllm_worker.load.dummy import byte_tokenizer
from sfllm_worker.load.loader import resolve_dtype
from sfllm_worker.model.attention import AttentionBatch

SMALL = LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=7,
)


def save(directory: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(SMALL).save_pretrained(directory, **options)
    (directory / "tokenizer.json").write_text(byte_tokenizer(300).to_str(), encoding="utf-8")
    return directory


def first_logits(loaded: LoadedModel) -> torch.Tensor:
    batch = AttentionBatch.build([4], [4], [[1]], 4, loaded.decoder.device)
    kv = KVCache(loaded.config, 2, 4, loaded.dtype, loaded.decoder.device)
    with torch.inference_mode():
        hidden = loaded.decoder.forward(torch.arange(4), batch.positions, batch, kv)
        return loaded.decoder.logits(hidden)


def test_a_sharded_checkpoint_loads_like_a_single_file(tmp_path: Path) -> None:
    single, sharded = save(tmp_path / "one"), save(tmp_path / "many", max_shard_size="20KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(first_logits(load_model(single)), first_logits(load_model(sharded)))


def edited(directory: Path, change: Any) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    directory = edited(save(tmp_path), lambda tensors: tensors.pop(name))
    with pytest.raises(ModelLoadError, match=f"tensor {name} is missing"):
        load_model(directory)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    directory = edited(save(tmp_path), lambda tensors: tensors.update({name: torch.zeros(32, 32)}))
    with pytest.raises(ModelLoadError, match=rf"{name} has shape \(32, 32\), expected \(16, 32\)"):
        load_model(directory)


def test_a_tensor_that_nobody_expected_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"model.layers.0.odd.weight": torch.zeros(1)}
    directory = edited(save(tmp_path), lambda tensors: tensors.update(odd))
    with caplog.at_level(logging.WARNING):
        load_model(directory)
    assert "model.layers.0.odd.weight" in caplog.text


def test_a_plain_checkpoint_gives_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_model(save(tmp_path))
    assert not caplog.records


def test_a_shard_that_lacks_what_the_index_promises_is_named(tmp_path: Path) -> None:
    directory = save(tmp_path, max_shard_size="20KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = files[0]
    index["weight_map"]["model.extra"] = files[0]
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"tensor model\.(extra|norm\.weight) is missing"):
        load_model(directory)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda d: (d / "model.safetensors").write_bytes(b"short"), "cannot read .*model.safetensors"),
        (lambda d: (d / "config.json").unlink(), "cannot read .*config.json"),
        (lambda d: (d / "config.json").write_text("{"), "cannot read .*config.json"),
        (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
    ],
)
def test_a_broken_directory_is_an_error_that_names_the_file(spoil: Any, message: str, tmp_path: Path) -> None:
    directory = save(tmp_path)
    spoil(directory)
    with pytest.raises(ModelLoadError, match=message):
        load_model(directory)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="absent is not a directory"):
        load_model(tmp_path / "absent")


def test_equal_weights_have_equal_fingerprints_and_others_do_not(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one"), save(tmp_path / "two")
    assert load_model(one).fingerprint == load_model(two).fingerprint
    assert load_model(one, dtype="bfloat16").fingerprint != load_model(two).fingerprint
    edited(two, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert load_model(one).fingerprint != load_model(two).fingerprint


@pytest.mark.parametrize(
    ("name", "stored", "device", "expected"),
    [
        ("auto", "float32", "cpu", torch.float32),
        ("auto", "bfloat16", "cuda", torch.bfloat16),
        ("auto", "float16", "cuda", torch.float16),
        ("auto", "float16", "cpu", torch.bfloat16),
        ("auto", None, "cpu", torch.bfloat16),
        ("float16", "float32", "cpu", torch.float16),
    ],
)
def test_auto_keeps_the_stored_dtype_where_the_device_is_fast_in_it(
    name: str, stored: str | None, device: str, expected: torch.dtype
) -> None:
    assert resolve_dtype(name, stored, torch.device(device)) == expected


def test_unknown_dtypes_and_formats_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="unsupported dtype: int4"):
        load_model("tiny-llama", dtype="int4", load_format="dummy")
    with pytest.raises(ModelLoadError, match="unknown load format: pickle"):
        load_model("tiny-llama", load_format="pickle")


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3"])
def test_dummy_weights_are_the_same_for_the_same_seed(shape: str) -> None:
    one, two, other = (load_model(shape, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first_logits(one), first_logits(two))
    assert not torch.equal(first_logits(one), first_logits(other))
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert bool(torch.isfinite(first_logits(one)).all())


def test_every_token_of_a_dummy_model_decodes_to_text() -> None:
    loaded = load_model("tiny-llama", load_format="dummy")
    tokenizer = Tokenizer.from_str(loaded.assets["tokenizer.json"].decode())
    assert tokenizer.get_vocab_size() == loaded.config.vocab_size
    text = "Any text, naïve or 日本語\n<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert all(tokenizer.decode([token]) for token in range(259, loaded.config.vocab_size))
    assert loaded.eos_token_ids == (tokenizer.token_to_id("<|endoftext|>"),)


def test_a_directory_with_only_a_config_makes_a_dummy_model(tmp_path: Path) -> None:
    SMALL.architectures = ["LlamaForCausalLM"]
    SMALL.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, load_format="dummy", dtype="float32")
    assert loaded.config.hidden_size == 32
    assert first_logits(loaded).shape == (4, 300)
    with pytest.raises(ModelLoadError, match="nowhere is neither a directory"):
        load_model("nowhere", load_format="dummy")


def test_a_vocabulary_too_small_for_bytes_cannot_have_a_byte_tokenizer() -> None:
    with pytest.raises(ModelLoadError, match="vocab_size of 259, not 258"):
        byte_tokenizer(258)


def test_the_template_file_comes_before_the_one_in_the_tokenizer_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert model_assets(tmp_path)["chat_template.jinja"] == b"plain"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "one"}))
    assert model_assets(tmp_path)["chat_template.jinja"] == b"one"
    (tmp_path / "chat_template.jinja").write_text("from the file é", encoding="utf-8")
    assert model_assets(tmp_path)["chat_template.jinja"].decode() == "from the file é"


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert set(model_assets(tmp_path)) == {"tokenizer.json", "tokenizer_config.json"}


def test_a_tokenizer_config_is_reduced_to_token_strings_and_flags() -> None:
    raw = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "add_bos_token": True,
        "added_tokens_decoder": {"0": {}},
        "chat_template": "long",
    }
    assert reduced_tokenizer_config(raw) == {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}


def test_generation_defaults_are_read_and_ends_of_text_united(tmp_path: Path) -> None:
    directory = save(tmp_path)
    raw = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None, "eos_token_id": [9, 7]}
    (directory / "generation_config.json").write_text(json.dumps(raw))
    loaded = load_model(directory)
    assert loaded.generation == GenerationDefaults(0.6, 0.95, 20, None, None, (9, 7))
    assert loaded.eos_token_ids == (7, 9)


def test_generation_defaults_of_a_wrong_type_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="temperature must be a number"):
        GenerationDefaults.from_hf({"temperature": "hot"})
