"""From settings to an engine and a model card."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from sfllm.messages import GenerationDefaults, ModelCard, Sampling
from sfllm.settings import WorkerSettings
from sfllm_worker.load import load_model
from sfllm_worker.sizing import automatic_batch_size, cache_blocks, choose_device
from sfllm_worker.startup import GPU_WARM_UP, WARM_UP, build_engine, make_card, warm_up

CPU = torch.device("cpu")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tiny model's configuration with defaults of its own."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    generation = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": [2, 5]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path


def card(directory: Path, **settings: object) -> ModelCard:
    values = WorkerSettings(model=str(directory), load_format="dummy", max_running_tokens=1024, **settings)
    model = load_model(directory, dtype="float32", load_format="dummy")
    return make_card(values, model, build_engine(values, model, CPU))


def test_the_card_has_the_models_own_defaults_unless_they_are_switched_off(directory: Path) -> None:
    assert card(directory).defaults == GenerationDefaults(0.6, 0.9, None, None, 1.1)
    assert card(directory, generation_defaults=False).defaults == GenerationDefaults()


def test_end_of_text_tokens_of_both_files_count(directory: Path) -> None:
    assert set(card(directory).eos_token_ids) == {2, 5}


def test_names_are_the_first_and_its_aliases(directory: Path) -> None:
    named = card(directory, served_model_name=("a", "b", "c"))
    assert (named.name, named.aliases) == ("a", ("b", "c"))
    assert card(directory).name == directory.name


def test_the_context_is_bounded_by_the_model_the_flag_and_the_cache(directory: Path) -> None:
    assert card(directory).max_model_len == 512
    assert card(directory, max_context_length=100).max_model_len == 100
    assert card(directory, max_context_length=4000).max_model_len == 512
    model = load_model(directory, dtype="float32", load_format="dummy")
    small = WorkerSettings(model=str(directory), load_format="dummy", max_running_tokens=64)
    assert build_engine(small, model, CPU).max_model_len == 64


@pytest.mark.parametrize("requests", [WARM_UP, GPU_WARM_UP])
def test_the_warm_up_leaves_nothing_behind_and_tells_the_time_of_a_token(
    directory: Path, requests: tuple[Sampling, ...]
) -> None:
    model = load_model(directory, dtype="float32", load_format="dummy")
    settings = WorkerSettings(model=str(directory), load_format="dummy", max_running_tokens=1024)
    engine = build_engine(settings, model, CPU)
    assert 0 < warm_up(engine, requests) < math.inf
    assert engine.free_kv_tokens == engine.kv_tokens


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux gives memory ahead")
def test_an_idle_engine_on_a_cpu_gives_blocks_their_memory_and_then_rests(directory: Path) -> None:
    model = load_model(directory, dtype="float32", load_format="dummy")
    settings = WorkerSettings(model=str(directory), load_format="dummy", max_running_tokens=1024)
    engine = build_engine(settings, model, CPU)
    assert engine.idle()
    assert any(not engine.idle() for _ in range(100))
    assert not engine.idle()


def test_the_cache_takes_its_share_of_the_memory_but_no_more_than_is_useful() -> None:
    def blocks(**changes: object) -> int:
        values = {"cache_tokens": None, "mem_fraction": 0.5, "useful_tokens": 10**12} | changes
        return cache_blocks(device=CPU, bytes_per_block=2**20, block_size=32, **values)

    assert blocks(cache_tokens=100) == 4
    assert blocks(useful_tokens=320) == 10
    assert 1 <= blocks(mem_fraction=0.001) <= blocks(mem_fraction=0.002) <= blocks()


def test_the_batch_follows_the_cache() -> None:
    assert automatic_batch_size(512 * 20, 8192) == 20
    assert automatic_batch_size(512 * 1000, 8192) == 256
    assert automatic_batch_size(1000, 100) == 10
    assert automatic_batch_size(10, 8192) == 1


def test_a_gpu_that_is_not_there_is_a_clear_error() -> None:
    if torch.cuda.is_available():
        assert choose_device("cuda").type == "cuda"
    else:
        with pytest.raises(ValueError, match="no usable GPU"):
            choose_device("cuda")
    assert choose_device("cpu") == CPU
