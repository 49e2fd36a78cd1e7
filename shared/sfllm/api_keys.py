"""API keys as they are stored: a text file of names and SHA-256 hashes, never of keys.

A line is `NAME:HASH`, 64 hex digits of the key's SHA-256; empty lines and lines that begin with `#` mean
nothing. A name may have several keys, so that one can be replaced while both work. Plain SHA-256 is enough
for keys that are drawn at random (`new_key`, 256 bits): nobody finds them by trying. It would not be for
passwords.
"""

from __future__ import annotations

import re
import secrets
from hashlib import sha256

KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_HASH = re.compile(r"[0-9a-fA-F]{64}")


def new_key() -> str:
    """A key that nobody can guess."""
    return "sk-" + secrets.token_urlsafe(KEY_BYTES)


def hash_of(key: bytes) -> bytes:
    """The SHA-256 of a key's bytes as they are in a header."""
    return sha256(key).digest()


def key_line(name: str, key: str) -> str:
    """The line of a file of keys. Raises ValueError for a name that such a line cannot have."""
    if not _NAME.fullmatch(name):
        raise ValueError("a name of a key has 1 to 64 letters, digits and characters of . _ @ -")
    return f"{name}:{hash_of(key.encode()).hex()}\n"


def parse_keys(text: str) -> dict[bytes, str]:
    """Name by hash. Raises ValueError with the number of the line at fault, never its content.

    A file of nothing at all is refused, since it may be one that is being written; one of comments lets
    nobody in.
    """
    if not text.strip():
        raise ValueError("the file is empty; write a comment into it if nobody is to have a key")
    found: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        name, _, digits = entry.partition(":")
        if not _NAME.fullmatch(name) or not _HASH.fullmatch(digits):
            raise ValueError(f"line {number} is not NAME:HASH with 64 hex digits of a SHA-256")
        key_hash = bytes.fromhex(digits)
        if key_hash in found:
            raise ValueError(f"line {number} has the key of an earlier line")
        found[key_hash] = name
    return found
