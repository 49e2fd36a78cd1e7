"""What an image adds to its base, file by file."""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from docker_engine import Engine


@dataclass(frozen=True)
class Entry:
    """One file of a layer. A folder has no time, as it gets the build's when something is put into it."""

    kind: bytes
    mode: int
    owner: tuple[int, int]
    time: float | None
    link: str
    content: str


def added_files(engine: Engine, image: str, base: str, directory: Path) -> dict[str, Entry]:
    """The files of all layers that the base has not."""
    archive = directory / "image.tar"
    engine.run("save", "--output", str(archive), image, seconds=300)
    shared = len(json.loads(engine.run("inspect", "--format", "{{json .RootFS.Layers}}", base).stdout))
    files: dict[str, Entry] = {}
    with tarfile.open(archive) as saved:
        for layer in json.load(_member(saved, "manifest.json"))[0]["Layers"][shared:]:
            with tarfile.open(fileobj=_member(saved, layer)) as content:
                files |= {file.name: _entry(content, file) for file in content}
    archive.unlink()
    return files


def size_of(engine: Engine, image: str) -> float:
    """What the image takes unpacked, base included, in millions of bytes."""
    return int(engine.run("inspect", "--format", "{{.Size}}", image).stdout) / 1e6


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    found = archive.extractfile(name)
    assert found is not None
    return found


def _entry(layer: tarfile.TarFile, file: tarfile.TarInfo) -> Entry:
    content = hashlib.sha256(_member(layer, file.name).read()).hexdigest() if file.isreg() else ""
    time = None if file.isdir() else file.mtime
    return Entry(file.type, file.mode, (file.uid, file.gid), time, file.linkname, content)
