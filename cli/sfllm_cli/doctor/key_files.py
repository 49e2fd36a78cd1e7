"""Files of keys on this machine: what they hold, and who may read and change them."""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sfllm.api_keys import parse_keys
from sfllm.link_keys import (
    FILE_NAME,
    ROLES,
    ClientRole,
    LinkKeysError,
    key_file,
    read_client_keys,
    read_scheduler_keys,
)


class ApiKeyFile(NamedTuple):
    """A file of hashed API keys. `mode` are its permissions; `fault` is why it cannot be used."""

    path: str
    mode: int = 0
    keys: int = 0
    fault: str = ""


def read_api_keys(path: str) -> ApiKeyFile:
    """What a gateway would make of the file."""
    try:
        mode = stat.S_IMODE(Path(path).stat().st_mode)
        return ApiKeyFile(path, mode, len(parse_keys(Path(path).read_text(encoding="utf-8"))))
    except OSError as error:
        return ApiKeyFile(path, fault=error.strerror or str(error))
    except ValueError as error:
        return ApiKeyFile(path, fault=str(error))


class LinkKeyFile(NamedTuple):
    """Keys of a service's links, of which only public ones are kept. `fault` is why they cannot be used.

    `scheduler` is the scheduler that a gateway or worker believes; `gateways` and `workers` are those that a
    scheduler lets in.
    """

    path: str
    role: str = ""
    public: bytes = b""
    scheduler: bytes = b""
    gateways: frozenset[bytes] = frozenset()
    workers: frozenset[bytes] = frozenset()
    fault: str = ""


def read_link_keys(paths: Sequence[str]) -> tuple[LinkKeyFile, ...]:
    """What is in these files, and in the folders of a set of keys; what is missing of a set is a fault."""
    files: list[LinkKeyFile] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(_link_keys(path))
            continue
        there = sorted(path.glob(f"*/{FILE_NAME}"))
        expected = [key_file(path, role) for role in ROLES]
        files += [_link_keys(file) for file in there]
        files += [LinkKeyFile(str(file), fault="it is missing") for file in expected if file not in there]
    return tuple(files)


def _link_keys(path: Path) -> LinkKeyFile:
    role = _client_role(path)
    try:
        if role is not None:
            client = read_client_keys(path, role)
            return LinkKeyFile(str(path), role, client.public, client.scheduler)
        keys = read_scheduler_keys(path)
    except LinkKeysError as error:
        return LinkKeyFile(str(path), role or "", fault=str(error).removeprefix(f"{path} "))
    peers = (frozenset(keys.gateways.values()), frozenset(keys.workers.values()))
    return LinkKeyFile(str(path), "scheduler", keys.public, b"", *peers)


def _client_role(path: Path) -> ClientRole | None:
    """Whether it says that it is a gateway's or a worker's; reading it properly tells what else is wrong."""
    roles: dict[object, ClientRole] = {"gateway": "gateway", "worker": "worker"}
    try:
        return roles.get(tomllib.loads(path.read_text(encoding="utf-8")).get("role"))
    except (OSError, ValueError, TypeError):
        return None
