"""Token ids to text as they arrive, never splitting a code point.

Byte-level vocabularies (GPT-2, Llama 3, Qwen, SmolLM) map every token to bytes, so an
incremental UTF-8 decoder gives exactly the library's decoding, in constant time a
token. Other vocabularies are decoded by the library over a short window; text that
ends in an unfinished character waits there.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Protocol

from tokenizers import Tokenizer, decoders

REPLACEMENT = "\ufffd"
MAX_WINDOW_TOKENS = 16
"""An unfinished character is given up after this many tokens; the longest takes four bytes."""

KEPT_PIECES = 2**15
"""Tokens whose bytes are remembered where finding them takes the library two decodes."""


class Detokenizer(Protocol):
    """Turns one choice's tokens into text; the pieces add up to the text of all tokens."""

    def feed(self, ids: Sequence[int]) -> str:
        """The text that is certain after these further tokens."""

    def finish(self) -> str:
        """What is left when no more tokens come."""


class ByteDetokenizer:
    """Incremental decoding where every token is a string of bytes."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int]) -> str:
        """See `Detokenizer`."""
        return self._decoder.decode(b"".join(map(self._token_bytes, ids)))

    def finish(self) -> str:
        """See `Detokenizer`."""
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """Incremental decoding by the library: a window of the newest tokens is decoded again.

    Invariant: the text of tokens before `_read` was given away; the window starts one piece earlier,
    because many decoders treat the first token of a text differently.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], hidden: frozenset[int]) -> None:
        self._decode = decode
        self._hidden = hidden
        self._window: list[int] = []
        self._read = 0

    def feed(self, ids: Sequence[int]) -> str:
        """See `Detokenizer`."""
        return "".join([self._add(token) for token in ids if token not in self._hidden])

    def finish(self) -> str:
        """See `Detokenizer`."""
        return self._take(self._decode(self._window))

    def _add(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._read < MAX_WINDOW_TOKENS:
            return ""
        return self._take(text)

    def _take(self, text: str) -> str:
        piece = text[len(self._decode(self._window[: self._read])) :]
        if piece:
            del self._window[: self._read]
            self._read = len(self._window)
        return piece


class TokenBytes:
    """The bytes of each token of a byte-level vocabulary, looked up once."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._known: dict[int, bytes] = {}

    def __call__(self, token: int) -> bytes:
        """The bytes of `token`; none for hidden tokens and ids outside the vocabulary."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._look_up(token)
        return found

    def _look_up(self, token: int) -> bytes:
        text = None if token in self._hidden else self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        try:
            return bytes([_BYTE_OF_CHARACTER[character] for character in text])
        except KeyError:  # an added token with characters outside the alphabet stands for itself
            return text.encode()


class PieceBytes:
    """The bytes that a token of any other vocabulary adds to a text that has begun."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._look_up = lru_cache(KEPT_PIECES)(self._find)

    def __call__(self, token: int) -> bytes:
        """The bytes of `token`; none for ids outside the vocabulary."""
        return self._look_up(token)

    def _find(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        if byte:
            return bytes.fromhex(byte[1])
        once, twice = (self._tokenizer.decode([token] * count, skip_special_tokens=False) for count in (1, 2))
        text: str = twice[len(once) :]  # decoders treat the first token of a text differently
        return text.encode()


class Detokenizers:
    """Makes the detokenizers of one tokenizer. `token_bytes` gives the bytes of any token, shown or not.

    `special` are the texts of the special tokens, with their ids.
    """

    token_bytes: Callable[[int], bytes]

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = {entry.content: token for token, entry in added.items() if entry.special}
        self._hidden = frozenset(self.special.values())
        self._shown_bytes: dict[frozenset[int], TokenBytes] | None = None
        if isinstance(tokenizer.decoder, decoders.ByteLevel):
            every = TokenBytes(tokenizer, frozenset())
            self._shown_bytes = {frozenset(): every}
            self.token_bytes = every
        else:
            self.token_bytes = PieceBytes(tokenizer)

    def make(self, skip_special_tokens: bool, shown: Collection[str] = ()) -> Detokenizer:
        """A detokenizer for a new choice. The special tokens `shown` are not skipped."""
        hidden = self._hidden if skip_special_tokens else frozenset()
        if shown and hidden:
            hidden -= {self.special.get(text, -1) for text in shown}
        if self._shown_bytes is not None:
            if hidden not in self._shown_bytes:  # one for each way of a model to write calls and thinking
                self._shown_bytes[hidden] = TokenBytes(self._tokenizer, hidden)
            return ByteDetokenizer(self._shown_bytes[hidden])
        tokenizer = self._tokenizer

        def decode(ids: Sequence[int]) -> str:
            text: str = tokenizer.decode(ids, skip_special_tokens=False)
            return text

        return WindowDetokenizer(decode, hidden)


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level vocabularies use for bytes (as GPT-2 defined them)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + index): byte for index, byte in enumerate(rest)}
    return alphabet


_BYTE_OF_CHARACTER = _byte_alphabet()
