from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from model_references import make_reference

from sfllm_worker.load import ModelLoadError, gguf_cache, load_model
from sfllm_worker.load.gguf import GgufFile
from sfllm_worker.load.gguf_cache import converted, write_directory


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "Tiny model.gguf"
    write_gguf(make_reference("llama", path.parent), "llama", path, chat_template="{{ messages }}")
    return path


@pytest.fixture(scope="module")
def directory(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tiny_gguf, torch.bfloat16, tmp_path_factory.mktemp("cache"))


def test_a_conversion_is_a_whole_hugging_face_directory(directory: Path) -> None:
    assert {path.name for path in directory.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert directory.name.startswith("Tiny_model-")
    assert directory.name.endswith("-bfloat16")


def test_a_second_call_finds_the_first_ones_result_untouched(tiny_gguf: Path, directory: Path) -> None:
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert converted(tiny_gguf, torch.bfloat16, directory.parents[1]) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == written


def test_another_version_of_the_converter_does_not_use_it(
    tiny_gguf: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(gguf_cache, "CONVERTER_VERSION", 999)
    monkeypatch.setattr(gguf_cache, "_convert_into", lambda path, dtype, target, bits: made.append(target))
    assert converted(tiny_gguf, torch.bfloat16, directory.parents[1]) == made[0] != directory


def test_the_converted_model_knows_its_name_end_and_template(
    tiny_gguf: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFLLM_CACHE_DIR", str(directory.parents[1]))
    loaded = load_model(tiny_gguf)
    assert loaded.name == "Tiny model"
    assert loaded.dtype == torch.bfloat16
    assert loaded.eos_token_ids == (256,)
    assert loaded.max_context_length == 256
    assert loaded.assets["chat_template.jinja"] == b"{{ messages }}"
    assert set(loaded.assets) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert load_model(tiny_gguf).fingerprint == loaded.fingerprint


def test_large_models_are_written_in_shards_that_load_the_same(
    tiny_gguf: Path, directory: Path, tmp_path: Path
) -> None:
    write_directory(GgufFile(tiny_gguf), torch.bfloat16, tmp_path, shard_bytes=50_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, sharded = load_model(directory).decoder.weights, load_model(tmp_path).decoder.weights
    assert torch.equal(whole.embedding, sharded.embedding)
    rows = torch.randn(2, 48, dtype=torch.bfloat16)
    for ours, theirs in zip(whole.layers, sharded.layers, strict=True):
        assert torch.equal(ours.qkv(rows), theirs.qkv(rows))
        assert torch.equal(ours.gate_up(rows), theirs.gate_up(rows))


CONVERT = """
import sys, pathlib, torch
from sfllm_worker.load.gguf_cache import converted
torch.set_num_threads(1)
print(converted(pathlib.Path(sys.argv[1]), torch.bfloat16, pathlib.Path(sys.argv[2])))
"""


def test_two_workers_that_start_at_once_share_one_conversion(tiny_gguf: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONVERT, str(tiny_gguf), str(tmp_path)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (worker.communicate(timeout=120)[0].strip() for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0]
    assert first == second
    visible = [path for path in (tmp_path / "models").iterdir() if path.is_dir()]
    assert visible == [Path(first)]  # nothing temporary is left either


def test_what_a_killed_conversion_left_behind_is_removed(tiny_gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "models" / "name"
    abandoned = tmp_path / "models" / ".name.tmp-abc"
    abandoned.mkdir(parents=True)
    (abandoned / "model.safetensors").write_bytes(b"half")
    gguf_cache._convert_into(tiny_gguf, torch.bfloat16, target, None)
    assert target.is_dir()
    assert not abandoned.exists()


def test_a_cache_path_through_a_file_is_an_error_that_names_it(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelLoadError, match="cannot write the converted model"):
        converted(tiny_gguf, torch.bfloat16, tmp_path / "file")


def test_a_lock_that_stays_held_ends_in_an_error_instead_of_a_hang(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_cache, "_LOCK_TIMEOUT_S", 0.0)
    target = converted(tiny_gguf, torch.float16, tmp_path)
    target.rename(tmp_path / "elsewhere")
    lock = target.parent / f".{target.name}.lock"
    with gguf_cache._locked(lock), pytest.raises(ModelLoadError, match="another process has held"):
        converted(tiny_gguf, torch.float16, tmp_path)
    assert converted(tiny_gguf, torch.float16, tmp_path) == target
