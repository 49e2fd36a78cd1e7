"""Which API keys are let in: those of the settings, and those of a file that may change at any time."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import structlog

from sfllm.api_keys import hash_of, parse_keys

CHECK_SECONDS = 1.0
"""How often a file of keys is looked at, at most: so long a key that was taken out may still be let in."""

NAME_DIGITS = 16

log = structlog.get_logger()


class _Version(NamedTuple):
    """What tells one content of a file from another. A secret that Kubernetes mounts changes its inode."""

    inode: int
    size: int
    changed: int


class KeyFile:
    """A file of hashed keys, read again when it changes. A content that cannot be used changes nothing."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or ValueError for a file that cannot be used."""
        self._path = path
        self._version = _version(path)
        self._names = parse_keys(path.read_text(encoding="utf-8"))
        self._checked = 0.0
        self._problem = ""

    def names(self, now: float) -> dict[bytes, str]:
        """Name by hash, at most `CHECK_SECONDS` old at `now` (monotonic seconds)."""
        if now - self._checked >= CHECK_SECONDS:
            self._checked = now
            self._check()
        return self._names

    def _check(self) -> None:
        try:
            seen = _version(self._path)
            if seen == self._version:
                self._problem = ""
                return
            self._names = parse_keys(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = _reason(error)
            if reason != self._problem:  # tried again every second, told once
                log.error("API keys stay as they were", path=str(self._path), reason=reason)
            self._problem = reason
            return
        self._version, self._problem = seen, ""
        log.info("API keys read again", path=str(self._path), keys=len(self._names))


class ApiKeys:
    """All keys that are let in. Without any setting of keys everybody is.

    A key is looked up by its hash in a dictionary. That takes a time that may depend on the hash, but not on
    the key in any way that helps to find one: whoever learns a part of a stored hash still has to find
    a text of 256 random bits that it belongs to.
    """

    def __init__(self, keys: tuple[str, ...], file: str | None) -> None:
        """Raises ValueError for a file that cannot be used; the text names it."""
        self._given = {hash_of(key): tenant_of(key) for key in (key.encode() for key in keys)}
        try:
            self._file = None if file is None else KeyFile(Path(file))
        except (OSError, ValueError) as error:
            raise ValueError(f"--api-key-file {file}: {_reason(error)}") from error

    @property
    def needed(self) -> bool:
        """Whether requests need a key at all."""
        return bool(self._given) or self._file is not None

    def name(self, key: bytes, now: float) -> str | None:
        """The name of the key's owner, None for a key that is not let in."""
        key_hash = hash_of(key)
        if self._file is not None and (name := self._file.names(now).get(key_hash)) is not None:
            return name
        return self._given.get(key_hash)


def tenant_of(key: bytes) -> str:
    """What schedulers call the owner of a key without a name: the first hex digits of its SHA-256."""
    return hash_of(key).hex()[:NAME_DIGITS] if key else ""


def _version(path: Path) -> _Version:
    found = path.stat()
    return _Version(found.st_ino, found.st_size, found.st_mtime_ns)


def _reason(error: OSError | ValueError) -> str:
    """Why, without anything of the file's content, which a decoder's error would quote."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is not UTF-8" if isinstance(error, UnicodeError) else str(error)
