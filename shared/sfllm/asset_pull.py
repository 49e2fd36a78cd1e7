"""Fetching a file in chunks: a pure state machine, used by the scheduler and by gateways.

One chunk is outstanding at a time, so that megabytes never sit in front of anything
else; the whole is believed only when its SHA-256 is the one asked for.
"""

from __future__ import annotations

import hashlib

from sfllm.messages import Asset, AssetChunk, AssetGet

CHUNK_BYTES = 256 * 2**10
MAX_ASSET_BYTES = 128 * 2**20


class AssetError(Exception):
    """The asset cannot be had from this peer; the text says why."""


class AssetPull:
    """The pull of one asset. Ask `request()`, feed `add(chunk)` until it returns the content."""

    def __init__(self, asset: Asset) -> None:
        if asset.size_bytes > MAX_ASSET_BYTES:
            raise AssetError(f"{asset.name} has {asset.size_bytes} bytes, more than {MAX_ASSET_BYTES}")
        self.asset = asset
        self._data = bytearray()

    def request(self) -> AssetGet:
        """The message that asks for the next chunk; after a timeout, send it again."""
        return AssetGet(sha256=self.asset.sha256, offset=len(self._data))

    def add(self, chunk: AssetChunk) -> bytes | None:
        """Take a chunk; the whole content once it is complete, else None. Raises `AssetError`."""
        if chunk.sha256 != self.asset.sha256 or chunk.offset != len(self._data):
            return None  # an answer to an earlier, repeated question
        if chunk.total_bytes != self.asset.size_bytes or (not chunk.data and chunk.total_bytes):
            raise AssetError(f"the peer does not have {self.asset.name} (any more)")
        if len(self._data) + len(chunk.data) > self.asset.size_bytes:
            raise AssetError(f"{self.asset.name} is longer than announced")
        self._data += chunk.data
        if len(self._data) < self.asset.size_bytes:
            return None
        content = bytes(self._data)
        if hashlib.sha256(content).hexdigest() != self.asset.sha256:
            raise AssetError(f"{self.asset.name} does not have the announced SHA-256")
        return content


def asset_of(name: str, content: bytes) -> Asset:
    """The description of a file by its content."""
    return Asset(name=name, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


def chunk_of(sha256: str, content: bytes | None, offset: int) -> AssetChunk:
    """The answer to `AssetGet`; an empty chunk of zero total when the content is not here."""
    if content is None:
        return AssetChunk(sha256=sha256, offset=offset, total_bytes=0, data=b"")
    return AssetChunk(sha256, offset, len(content), content[offset : offset + CHUNK_BYTES])
