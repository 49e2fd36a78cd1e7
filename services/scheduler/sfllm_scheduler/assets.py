"""The scheduler's relay of model files: pulled from workers once, kept, handed to gateways.

Pure: messages and the time come in, messages to send come out.
"""

from __future__ import annotations

from collections import OrderedDict

from sfllm.asset_pull import AssetError, AssetPull, chunk_of
from sfllm.messages import Asset, AssetChunk, AssetGet, AssetOffer, Message, ModelCard

CACHE_BYTES = 256 * 2**20
ASK_AGAIN_SECONDS = 2.0
MOST_REPEATS = 5
MAX_INCOMPLETE = 256

Outgoing = list[tuple[bytes, Message]]


class AssetCache:
    """Contents by SHA-256, at most `limit_bytes` of them; the least recently used leave first."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._contents: OrderedDict[str, bytes] = OrderedDict()
        self.size_bytes = 0

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._contents

    def get(self, sha256: str) -> bytes | None:
        """The content, or None when it is not here."""
        if sha256 in self._contents:
            self._contents.move_to_end(sha256)
        return self._contents.get(sha256)

    def put(self, sha256: str, content: bytes) -> None:
        """Keep a content that is not here yet, older ones make place for it."""
        self._contents[sha256] = content
        self.size_bytes += len(content)
        while self.size_bytes > self._limit_bytes:
            _, gone = self._contents.popitem(last=False)
            self.size_bytes -= len(gone)


class _Pull:
    """An asset under way from `sources[0]`; the other sources have it too."""

    def __init__(self, asset: Asset, source: bytes) -> None:
        self.transfer = AssetPull(asset)
        self.sources = [source]
        self.asked_at = 0.0
        self.repeats = 0

    def ask(self, now: float) -> tuple[bytes, Message]:
        """The question for the next chunk."""
        self.asked_at = now
        return self.sources[0], self.transfer.request()

    def drop_source(self, peer: bytes) -> None:
        """Forget a source; the next one starts from the beginning."""
        if peer == self.sources[0]:
            self.transfer = AssetPull(self.transfer.asset)
            self.repeats = 0
        self.sources.remove(peer)


class AssetRelay:
    """Pulls what cards want from peers that offer it, and answers whoever asks for it.

    `failures` collects readable reasons of what went wrong, for the caller to log and clear.
    """

    def __init__(self, cache: AssetCache | None = None) -> None:
        self.cache = cache or AssetCache()
        self._incomplete: OrderedDict[str, ModelCard] = OrderedDict()
        self._pulls: dict[str, _Pull] = {}
        self.failures: list[str] = []

    def want(self, card: ModelCard) -> None:
        """A worker joined with this card: pull its assets when they are offered."""
        self._incomplete[card.name] = card
        if len(self._incomplete) > MAX_INCOMPLETE:
            self._incomplete.popitem(last=False)

    def take_ready(self) -> list[ModelCard]:
        """The wanted cards of which everything has arrived; each is given once."""
        ready = [
            card
            for card in self._incomplete.values()
            if all(asset.sha256 in self.cache for asset in card.assets)
        ]
        for card in ready:
            del self._incomplete[card.name]
        return ready

    def handle(self, peer: bytes, message: Message, now: float) -> Outgoing:
        """Answer a question, take a chunk, or start to pull what is offered."""
        match message:
            case AssetGet():
                content = self.cache.get(message.sha256)
                return [(peer, chunk_of(message.sha256, content, max(0, message.offset)))]
            case AssetChunk():
                return self._take(peer, message, now)
            case AssetOffer():
                return self._offered(peer, {asset.sha256 for asset in message.assets}, now)
            case _:
                raise TypeError(f"{type(message).__name__} is not about assets")

    def tick(self, now: float) -> Outgoing:
        """Ask again what was not answered; after several times, ask another source."""
        outgoing: Outgoing = []
        for sha256, pull in list(self._pulls.items()):
            if now < pull.asked_at + ASK_AGAIN_SECONDS:
                continue
            pull.repeats += 1
            if pull.repeats <= MOST_REPEATS:
                outgoing.append(pull.ask(now))
            else:
                outgoing += self._drop(sha256, pull.sources[0], "the peer does not answer", now)
        return outgoing

    def forget(self, peer: bytes, now: float) -> Outgoing:
        """A peer is gone: go on with others that have the same."""
        outgoing: Outgoing = []
        for sha256, pull in list(self._pulls.items()):
            if peer in pull.sources:
                outgoing += self._drop(sha256, peer, "the peer left", now)
        return outgoing

    def _offered(self, peer: bytes, offered: set[str], now: float) -> Outgoing:
        outgoing: Outgoing = []
        for asset in [asset for card in self._incomplete.values() for asset in card.assets]:
            if asset.sha256 not in offered or asset.sha256 in self.cache:
                continue
            pull = self._pulls.get(asset.sha256)
            if pull is not None:
                if peer not in pull.sources:
                    pull.sources.append(peer)
                continue
            try:
                pull = self._pulls[asset.sha256] = _Pull(asset, peer)
            except AssetError as error:
                self.failures.append(str(error))
                continue
            outgoing.append(pull.ask(now))
        return outgoing

    def _take(self, peer: bytes, chunk: AssetChunk, now: float) -> Outgoing:
        pull = self._pulls.get(chunk.sha256)
        if pull is None or pull.sources[0] != peer:
            return []
        before = pull.transfer.request().offset
        try:
            content = pull.transfer.add(chunk)
        except AssetError as error:
            return self._drop(chunk.sha256, peer, str(error), now)
        if content is not None:
            del self._pulls[chunk.sha256]
            self.cache.put(chunk.sha256, content)
            return []
        if pull.transfer.request().offset == before:
            return []  # an answer to a repeated question: asking again would double them for ever
        pull.repeats = 0
        return [pull.ask(now)]

    def _drop(self, sha256: str, peer: bytes, reason: str, now: float) -> Outgoing:
        pull = self._pulls[sha256]
        was_current = pull.sources[0] == peer
        pull.drop_source(peer)
        self.failures.append(f"{pull.transfer.asset.name}: {reason}")
        if not pull.sources:
            del self._pulls[sha256]
            return []
        return [pull.ask(now)] if was_current else []
