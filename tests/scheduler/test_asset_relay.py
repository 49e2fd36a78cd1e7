"""The relay of model files between workers and gateways."""

from __future__ import annotations

import pytest
from core_driver import card

from sfllm.asset_pull import CHUNK_BYTES, asset_of, chunk_of
from sfllm.messages import AssetChunk, AssetGet, AssetOffer
from sfllm_scheduler.assets import ASK_AGAIN_SECONDS, MOST_REPEATS, AssetCache, AssetRelay

CONTENT = b"x" * (CHUNK_BYTES + 10)
ASSET = asset_of("tokenizer.json", CONTENT)
CARD = card(assets=(ASSET,))


@pytest.fixture
def relay() -> AssetRelay:
    relay = AssetRelay()
    relay.want(CARD)
    return relay


def chunk(offset: int) -> AssetChunk:
    return chunk_of(ASSET.sha256, CONTENT, offset)


def test_a_wanted_asset_is_pulled_from_who_offers_it_and_makes_its_card_ready(relay: AssetRelay) -> None:
    assert relay.handle(b"w", AssetOffer((ASSET,)), 0.0) == [(b"w", AssetGet(ASSET.sha256, 0))]
    assert relay.take_ready() == []
    assert relay.handle(b"w", chunk(0), 0.1) == [(b"w", AssetGet(ASSET.sha256, CHUNK_BYTES))]
    assert relay.handle(b"w", chunk(CHUNK_BYTES), 0.2) == []
    assert relay.take_ready() == [CARD]
    assert relay.take_ready() == []
    assert relay.handle(b"g", AssetGet(ASSET.sha256, CHUNK_BYTES), 0.3) == [(b"g", chunk(CHUNK_BYTES))]


def test_what_no_card_wants_is_not_pulled(relay: AssetRelay) -> None:
    assert relay.handle(b"w", AssetOffer((asset_of("other", b"abc"),)), 0.0) == []


def test_a_card_without_assets_is_ready_at_once() -> None:
    relay = AssetRelay()
    relay.want(card())
    assert relay.take_ready() == [card()]


def test_a_repeated_answer_does_not_ask_twice(relay: AssetRelay) -> None:
    relay.handle(b"w", AssetOffer((ASSET,)), 0.0)
    assert len(relay.handle(b"w", chunk(0), 0.1)) == 1
    assert relay.handle(b"w", chunk(0), 0.2) == []


def test_a_chunk_of_somebody_else_is_ignored(relay: AssetRelay) -> None:
    relay.handle(b"w", AssetOffer((ASSET,)), 0.0)
    assert relay.handle(b"stranger", chunk(0), 0.1) == []


def test_silence_is_asked_again_and_then_the_next_source_is(relay: AssetRelay) -> None:
    relay.handle(b"one", AssetOffer((ASSET,)), 0.0)
    assert relay.handle(b"two", AssetOffer((ASSET,)), 0.0) == []
    asked = []
    now = 0.0
    for _ in range(MOST_REPEATS + 1):
        assert relay.tick(now + ASK_AGAIN_SECONDS / 2) == []
        now += ASK_AGAIN_SECONDS
        asked += [peer for peer, _ in relay.tick(now)]
    assert asked == [b"one"] * MOST_REPEATS + [b"two"]
    assert relay.failures == ["tokenizer.json: the peer does not answer"]


def test_a_source_that_leaves_is_replaced_from_the_beginning(relay: AssetRelay) -> None:
    relay.handle(b"one", AssetOffer((ASSET,)), 0.0)
    relay.handle(b"two", AssetOffer((ASSET,)), 0.0)
    relay.handle(b"one", chunk(0), 0.1)
    assert relay.forget(b"one", 0.2) == [(b"two", AssetGet(ASSET.sha256, 0))]
    assert relay.forget(b"two", 0.3) == []
    assert relay.handle(b"three", AssetOffer((ASSET,)), 0.4) == [(b"three", AssetGet(ASSET.sha256, 0))]


def test_a_source_with_other_content_is_dropped(relay: AssetRelay) -> None:
    relay.handle(b"w", AssetOffer((ASSET,)), 0.0)
    relay.handle(b"w", chunk(0), 0.1)
    bad = AssetChunk(ASSET.sha256, CHUNK_BYTES, len(CONTENT), b"y" * 10)
    assert relay.handle(b"w", bad, 0.2) == []
    assert "SHA-256" in relay.failures[0]
    assert relay.take_ready() == []


@pytest.mark.parametrize("offset", [-5, 10**12])
def test_any_offset_can_be_asked_for(relay: AssetRelay, offset: int) -> None:
    relay.cache.put("a", b"abc")
    ((_, answer),) = relay.handle(b"g", AssetGet("a", offset), 0.0)
    assert isinstance(answer, AssetChunk)
    assert answer.data in {b"abc", b""}


def test_the_cache_is_bounded_and_lets_the_least_used_go() -> None:
    cache = AssetCache(limit_bytes=10)
    cache.put("a", b"1234")
    cache.put("b", b"1234")
    assert cache.get("a") == b"1234"
    cache.put("c", b"1234")
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, False, True)
    assert cache.size_bytes == 8
    cache.put("huge", bytes(11))
    assert cache.size_bytes == 0
