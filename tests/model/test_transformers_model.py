"""What runs through transformers, and what is refused. Its results are compared in `test_families`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_references import Sequences, make_model, make_reference
from model_variants import TINY, VARIANTS

from sfllm_worker.load import ModelLoadError, load_model
from sfllm_worker.model.transformers_model import ATTENTION_NAME, TransformersModel

SMALL = {**TINY, "pad_token_id": 0}


def saved(config: Any, directory: Path) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def edited(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Mamba", {"state_size": 4}, "MambaForCausalLM keeps a state that is not keys and values"),
        ("Bloom", {"n_head": 6}, "0 of 3 layers of BloomForCausalLM attend through"),
        ("GptOss", {"num_local_experts": 2, "head_dim": 8}, "unsupported attention option: s_aux"),
        ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "unsupported layer_types: conv"),
        ("Olmo2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling: dynamic"),
    ],
)
def test_models_that_cannot_be_paged_are_refused(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(getattr(transformers, f"{name}Config")(**{**SMALL, **options}), tmp_path)
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration is no decoder-only"),
        ({"architectures": ["InventedForCausalLM"]}, "InventedForCausalLM is no decoder-only"),
        ({"architectures": [], "model_type": "invented"}, "model type invented is no decoder-only"),
        ({"quantization_config": {"quant_method": "awq"}}, "unsupported quantization_config: awq"),
        ({"is_encoder_decoder": True}, "has an encoder"),
        ({"vision_config": {}}, "takes more than text"),
        ({"num_hidden_layers": 4}, "tensor model.layers.3.* is missing"),
        ({"intermediate_size": 96}, "tensor model.layers.* has another shape|cannot run Olmo2"),
        ({"num_attention_heads": "many"}, "transformers cannot run Olmo2ForCausalLM"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_reference("olmo2", tmp_path)
    with pytest.raises(ModelLoadError, match=message):
        load_model(edited(tmp_path, **changes), dtype="float32")


def test_without_transformers_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_reference("olmo2", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelLoadError, match=r"Olmo2ForCausalLM .*pip install .sfllm\[worker,transformers\]"):
        load_model(tmp_path)


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    make_reference("olmo2", tmp_path)
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass Model: pass\n")
    remote = {"AutoConfig": "modeling.Model", "AutoModelForCausalLM": "modeling.Model"}
    loaded = load_model(edited(tmp_path, auto_map=remote), dtype="float32")
    assert isinstance(loaded.decoder, TransformersModel)
    with pytest.raises(ModelLoadError, match="OwnForCausalLM is no decoder-only"):
        load_model(edited(tmp_path, architectures=["OwnForCausalLM"], model_type="own"))
    assert not (tmp_path / "was-run").exists()


def test_a_model_that_mixes_neighbours_outside_of_attention_is_refused(tmp_path: Path) -> None:
    class Shifted(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            mixed: torch.Tensor = self.inner(hidden.roll(1, dims=1))
            return mixed

    make_reference("olmo2", tmp_path)
    load_model(tmp_path, dtype="float32")  # registers the attention function
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).eval()
    model.model.layers[1].mlp = Shifted(model.model.layers[1].mlp)
    with pytest.raises(ModelLoadError, match="mixes tokens outside of attention"):
        TransformersModel(model)


@pytest.mark.parametrize("name", ["granite", "starcoder2"])
def test_weights_are_counted_once_even_when_the_head_is_tied(name: str, tmp_path: Path) -> None:
    reference = make_reference(name, tmp_path)
    decoder = load_model(tmp_path, dtype="float32").decoder
    parameters = sum(parameter.nbytes for parameter in reference.parameters())
    assert parameters <= decoder.weight_bytes <= parameters + 1024  # and a table of rotary frequencies


def test_dummy_weights_of_an_unknown_architecture_depend_on_the_seed_alone(tmp_path: Path) -> None:
    make_model(VARIANTS["gpt-neox"]).config.save_pretrained(tmp_path)

    def first_logits(seed: int) -> torch.Tensor:
        torch.rand(seed)  # the process's own generator takes no part
        loaded = load_model(tmp_path, load_format="dummy", seed=seed, dtype="float32")
        return Sequences(loaded.decoder, 1, 8).step([(0, [1, 2, 3])])[0]

    assert torch.equal(first_logits(1), first_logits(1))
    assert not torch.equal(first_logits(1), first_logits(2))


def test_bfloat16_runs_and_gives_float32_logits(tmp_path: Path) -> None:
    make_reference("starcoder2", tmp_path)
    loaded = load_model(tmp_path, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    [logits] = Sequences(loaded.decoder, 1, 40).step([(0, list(range(30)))])
    assert logits.dtype == torch.float32
    assert bool(torch.isfinite(logits).all())
