"""Fetching files in chunks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfllm.asset_pull import CHUNK_BYTES, MAX_ASSET_BYTES, AssetError, AssetPull, asset_of, chunk_of
from sfllm.messages import Asset, AssetChunk


def pulled(content: bytes) -> tuple[bytes, int]:
    """What a pull gives, and how many questions it took."""
    pull = AssetPull(asset_of("file", content))
    for questions in range(1, 100):
        question = pull.request()
        result = pull.add(chunk_of(question.sha256, content, question.offset))
        if result is not None:
            return result, questions
    raise AssertionError("the pull does not end")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3 * CHUNK_BYTES), st.binary(min_size=1, max_size=5))
def test_a_file_arrives_whole_in_chunks(size: int, pattern: bytes) -> None:
    content = (pattern * (size // len(pattern) + 1))[:size]
    result, questions = pulled(content)
    assert result == content
    assert questions == max(1, -(-size // CHUNK_BYTES))


def test_a_repeated_chunk_changes_nothing() -> None:
    content = b"x" * (CHUNK_BYTES + 1)
    pull = AssetPull(asset_of("file", content))
    first = chunk_of(pull.asset.sha256, content, 0)
    assert pull.add(first) is None
    assert pull.add(first) is None
    assert pull.add(chunk_of(pull.asset.sha256, content, CHUNK_BYTES)) == content


def test_a_chunk_of_another_file_is_ignored() -> None:
    pull = AssetPull(asset_of("file", b"abc"))
    assert pull.add(AssetChunk("0" * 64, 0, 3, b"abc")) is None
    assert pull.request().offset == 0


def test_content_with_another_hash_is_refused() -> None:
    pull = AssetPull(asset_of("file", b"abc"))
    with pytest.raises(AssetError, match="SHA-256"):
        pull.add(AssetChunk(pull.asset.sha256, 0, 3, b"abd"))


def test_a_peer_without_the_file_is_an_error() -> None:
    pull = AssetPull(asset_of("file", b"abc"))
    with pytest.raises(AssetError, match="does not have file"):
        pull.add(chunk_of(pull.asset.sha256, None, 0))


def test_more_than_was_announced_is_refused() -> None:
    pull = AssetPull(asset_of("file", b"abc"))
    with pytest.raises(AssetError, match="longer than announced"):
        pull.add(AssetChunk(pull.asset.sha256, 0, 3, b"abcd"))


def test_a_file_that_is_too_large_is_not_begun() -> None:
    with pytest.raises(AssetError, match="more than"):
        AssetPull(Asset("huge", "0" * 64, MAX_ASSET_BYTES + 1))
