"""What a model's own files say of embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfllm.messages import Pooling
from sfllm_worker.load.pooling import stored_pooling, write_pooling
from sfllm_worker.load.safetensors_files import SafetensorsSource
from sfllm_worker.model.errors import ModelLoadError


def write_modules(directory: Path, *names: str, modes: dict[str, bool] | None = None) -> None:
    modules = [
        {
            "idx": number,
            "path": "1_Pooling" if name == "Pooling" else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for number, name in enumerate(names)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    if modes is not None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(
            json.dumps({"word_embedding_dimension": 8, **modes})
        )


def test_a_model_that_says_nothing_gives_no_embeddings(tmp_path: Path) -> None:
    assert stored_pooling(tmp_path, 8) is None


@pytest.mark.parametrize(
    ("mode", "kind"), [("pooling_mode_mean_tokens", "mean"), ("pooling_mode_lasttoken", "last")]
)
@pytest.mark.parametrize("normalizes", [False, True])
def test_the_chain_of_modules_is_read(tmp_path: Path, mode: str, kind: str, normalizes: bool) -> None:
    names = ("Transformer", "Pooling", *(["Normalize"] if normalizes else []))
    write_modules(tmp_path, *names, modes={mode: True, "pooling_mode_cls_token": False})
    assert stored_pooling(tmp_path, 8) == Pooling(kind, 8, normalizes)


@pytest.mark.parametrize(
    "modes",
    [
        {"pooling_mode_cls_token": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
        {},
    ],
)
def test_other_ways_to_pool_are_refused(tmp_path: Path, modes: dict[str, bool]) -> None:
    write_modules(tmp_path, "Transformer", "Pooling", modes=modes)
    with pytest.raises(ModelLoadError, match="pooling_mode_mean_tokens"):
        stored_pooling(tmp_path, 8)


def test_a_module_that_would_change_embeddings_is_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, "Transformer", "Pooling", "Dense", modes={"pooling_mode_mean_tokens": True})
    with pytest.raises(ModelLoadError, match="Dense"):
        stored_pooling(tmp_path, 8)


@pytest.mark.parametrize("content", ["[1]", "{}", "[", ""])
def test_modules_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"modules\.json"):
        stored_pooling(tmp_path, 8)


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_what_a_conversion_writes_is_read_again(tmp_path: Path, kind: str) -> None:
    write_pooling(tmp_path, kind)
    assert stored_pooling(tmp_path, 16) == Pooling(kind, 16, True)


def test_tensors_are_found_without_the_prefix_that_models_without_a_head_leave_out(tmp_path: Path) -> None:
    save_file(
        {"embed_tokens.weight": torch.ones(4, 2), "norm.weight": torch.zeros(2)},
        tmp_path / "model.safetensors",
    )
    source = SafetensorsSource(tmp_path)
    assert source.take("model.embed_tokens.weight", (4, 2)).equal(torch.ones(4, 2))
    assert source.untaken() == ["norm.weight"]
