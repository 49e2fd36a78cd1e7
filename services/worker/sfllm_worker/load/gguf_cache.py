"""Converts a GGUF file once into a Hugging Face directory in the user's cache."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sfllm.model_files import cache_directory
from sfllm_worker.load.assets import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from sfllm_worker.load.fingerprint import file_fingerprint
from sfllm_worker.load.gguf import GgufFile
from sfllm_worker.load.gguf_tokenizer import build_tokenizer
from sfllm_worker.load.pooling import write_pooling
from sfllm_worker.load.safetensors_files import INDEX, SINGLE, stored_parts
from sfllm_worker.model.errors import ModelLoadError
from sfllm_worker.quant.policy import BITS

_log = logging.getLogger(__name__)

CONVERTER_VERSION = 2
"""Raised whenever a conversion would come out differently, so that older results are not used."""
_SHARD_BYTES = 2 << 30
_LOCK_TIMEOUT_S = 900.0
_LOCK_POLL_S = 0.1


def converted(path: Path, dtype: torch.dtype, cache: Path | None = None, quantization: str = "none") -> Path:
    """The directory with the converted contents of a `.gguf` file, made now if there is none yet.

    It lies in `models` of `cache`, which is the user's cache directory when none is given.

    The directory's name holds the file's fingerprint, the dtype, the converter's version and the
    `quantization` (a key of `BITS`), if any. It appears by one rename, so it is complete if it exists; a
    lock keeps several workers from converting at once.
    """
    if not path.is_file():
        raise ModelLoadError(f"{path} does not exist")
    parent = (cache or cache_directory()) / "models"
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.stem)
    suffix = str(dtype).removeprefix("torch.") + (f"-{quantization}" if quantization != "none" else "")
    key = f"{name}-{file_fingerprint(path)[:16]}v{CONVERTER_VERSION}-{suffix}"
    target = parent / key
    if target.is_dir():
        return target
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _locked(parent / f".{key}.lock"):
            if not target.is_dir():
                _convert_into(path, dtype, target, BITS[quantization])
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"cannot write the converted model to {target}: {error}") from error
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock, which the system drops if its holder dies."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ModelLoadError(
                        f"another process has held {path} for {_LOCK_TIMEOUT_S:.0f} s"
                    ) from None
                time.sleep(_LOCK_POLL_S)
        yield


def _convert_into(path: Path, dtype: torch.dtype, target: Path, bits: int | None) -> None:
    """Write a directory beside `target` and rename it. The caller holds the lock of `target`."""
    for abandoned in target.parent.glob(f".{target.name}.tmp-*"):  # of a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    started = time.monotonic()
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        temporary.chmod(0o755)
        write_directory(GgufFile(path), dtype, temporary, bits=bits)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _log.info("converted %s in %.1f s", path.name, time.monotonic() - started)


def write_directory(
    file: GgufFile,
    dtype: torch.dtype,
    directory: Path,
    shard_bytes: int = _SHARD_BYTES,
    bits: int | None = None,
) -> None:
    """Write a GGUF file's model as a Hugging Face directory with weights in `dtype`.

    With `bits`, weights of products are quantized, in the parts that `SafetensorsSource` puts together.
    """
    config = file.config()
    tokenizer = build_tokenizer(file.metadata)
    _write_json(directory / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    _write_json(directory / "generation_config.json", ends)
    (directory / TOKENIZER).write_text(tokenizer.tokenizer.to_str(), encoding="utf-8")
    # The class lets transformers load the directory without guessing another one from the model type.
    names = {**tokenizer.config, "tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(directory / TOKENIZER_CONFIG, names)
    if kind := file.pooling():
        write_pooling(directory, kind)
    if tokenizer.chat_template is not None:
        (directory / CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
    _write_weights(_stored_tensors(file, config, dtype, bits), directory, shard_bytes)


def _stored_tensors(
    file: GgufFile, config: Mapping[str, Any], dtype: torch.dtype, bits: int | None
) -> Iterator[tuple[str, Tensor]]:
    for name, weight in file.tensors(config, bits):
        if isinstance(weight, Tensor):
            yield name, weight.to(dtype).contiguous()
        else:
            yield from stored_parts(name, weight)


def _write_weights(tensors: Iterator[tuple[str, Tensor]], directory: Path, shard_bytes: int) -> None:
    """Write tensors as they come, in files of about `shard_bytes`, so that memory stays bounded."""
    where: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = size = count = 0

    def flush() -> None:
        nonlocal size, count
        count += 1
        name = f"model-{count:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        (directory / name).chmod(0o644)  # the library makes it private; the rest of the cache is not
        where.update(dict.fromkeys(shard, name))
        shard.clear()
        size = 0

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if count == 1:
        (directory / "model-00001.safetensors").rename(directory / SINGLE)
    else:
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
