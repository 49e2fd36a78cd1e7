from __future__ import annotations

from collections.abc import Callable

import pytest
from fake_scheduler import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sfllm_gateway.detokenize import Detokenizers

BYTES = byte_tokenizer()


def cuts(ids: list[int], sizes: list[int]) -> list[list[int]]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(ids[start : start + size])
        start += size
    return [*pieces, ids[start:]]


@given(st.lists(st.integers(0, 260)), st.lists(st.integers(0, 5)), st.booleans())
def test_deltas_of_any_byte_tokens_add_up_to_the_full_decode(
    ids: list[int], sizes: list[int], skip: bool
) -> None:
    detokenizer = Detokenizers(BYTES).make(skip_special_tokens=skip)
    text = "".join([detokenizer.feed(piece) for piece in cuts(ids, sizes)]) + detokenizer.finish()
    assert text == BYTES.decode(ids, skip_special_tokens=skip)


@given(st.text(), st.lists(st.integers(0, 5)))
def test_a_code_point_is_never_split(text: str, sizes: list[int]) -> None:
    detokenizer = Detokenizers(BYTES).make(skip_special_tokens=True)
    deltas = [detokenizer.feed(piece) for piece in cuts(list(text.encode()), sizes)]
    shown = ""
    for delta in deltas:
        shown += delta
        assert text.startswith(shown)
    assert shown == text
    assert detokenizer.finish() == ""


def test_an_unfinished_character_at_the_end_becomes_a_replacement() -> None:
    detokenizer = Detokenizers(BYTES).make(skip_special_tokens=True)
    assert detokenizer.feed([0xE2, 0x82]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_added_tokens_outside_the_byte_alphabet_stand_for_themselves() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<\uff5cthink\uff5c>"), AddedToken("two words")])
    ids = [104, 259, 105, 260]
    detokenizer = Detokenizers(tokenizer).make(skip_special_tokens=True)
    assert "".join(detokenizer.feed([token]) for token in ids) == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == "h<\uff5cthink\uff5c>itwo words"


def sentencepiece_like() -> Tokenizer:
    """A vocabulary as Llama 2 has it: spaces as U+2581, bytes as <0xNN> where no piece fits."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581hello", "a", "b"]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


WORDS = sentencepiece_like()
WORD_IDS = {piece: WORDS.token_to_id(piece) for piece in ("\u2581", "\u2581hello", "a", "b", "<s>")}


@given(st.lists(st.sampled_from([*WORD_IDS, "é", "€", "😀"]), max_size=30), st.lists(st.integers(0, 4)))
def test_deltas_of_a_vocabulary_with_byte_fallback_add_up(words: list[str], sizes: list[int]) -> None:
    ids: list[int] = []
    for word in words:
        ids += [WORD_IDS[word]] if word in WORD_IDS else [2 + byte for byte in word.encode()]
    detokenizer = Detokenizers(WORDS).make(skip_special_tokens=True)
    text = "".join([detokenizer.feed(piece) for piece in cuts(ids, sizes)]) + detokenizer.finish()
    assert text == WORDS.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_like])
def test_bytes_that_never_become_text_do_not_pile_up(make: Callable[[], Tokenizer]) -> None:
    detokenizer = Detokenizers(make()).make(skip_special_tokens=True)
    shown = sum(len(detokenizer.feed([2 + 0x80])) for _ in range(200))
    assert shown >= 150
