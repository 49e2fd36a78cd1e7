from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import gemma_tokenizer, sentencepiece_tokenizer

from sfllm_worker.load import ModelLoadError
from sfllm_worker.load.gguf import GgufFile
from sfllm_worker.load.gguf_tokenizer import GgufTokenizer, build_tokenizer, merges_from_scores

TEXTS = (
    "Hello world",
    "It's 2024, don't you'LL   think?\n\n  x=1234567;",
    "naïve café 日本語 🙂🙂 e\u0301",
    "a\tb\r\n c",
    " leading and trailing ",
    "<|im_start|>user\nhi<|im_end|>\n",
)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> GgufTokenizer:
    return build_tokenizer(GgufFile(smollm2_gguf).metadata)


@pytest.fixture(scope="module")
def transformers_smollm2(smollm2_gguf: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_text_is_tokenized_as_transformers_does_and_comes_back(
    smollm2: GgufTokenizer, transformers_smollm2: Any, text: str
) -> None:
    ids = smollm2.tokenizer.encode(text).ids
    assert ids == transformers_smollm2(text)["input_ids"]
    assert smollm2.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_every_digit_of_smollm2_stands_alone(smollm2: GgufTokenizer) -> None:
    # Where transformers' own conversion is wrong: it does not know this vocabulary's splitting.
    assert smollm2.tokenizer.encode("x 1234½").tokens == ["x", "Ġ", "1", "2", "3", "4", "Â½"]


def test_control_tokens_are_one_token_each_and_special(smollm2: GgufTokenizer) -> None:
    encoding = smollm2.tokenizer.encode("<|im_start|>user<|im_end|>")
    assert (encoding.ids[0], encoding.ids[-1]) == (1, 2)
    assert smollm2.tokenizer.decode(encoding.ids, skip_special_tokens=True) == "user"


def test_the_rest_of_a_tokenizer_comes_from_the_metadata(smollm2: GgufTokenizer) -> None:
    assert smollm2.config["bos_token"] == "<|im_start|>"
    assert smollm2.config["eos_token"] == "<|im_end|>"
    assert smollm2.config["add_bos_token"] is False
    assert smollm2.chat_template is not None
    assert "<|im_start|>assistant" in smollm2.chat_template


@pytest.fixture(scope="module")
def reloaded(smollm2: GgufTokenizer) -> Tokenizer:
    return Tokenizer.from_str(smollm2.tokenizer.to_str())


# The published vocabulary lacks some control bytes, and those with which characters above U+3FFFF start.
@given(text=st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"]) | st.just("\n")))
def test_any_text_survives_the_round_trip(reloaded: Tokenizer, text: str) -> None:
    assert reloaded.decode(reloaded.encode(text).ids, skip_special_tokens=False) == text


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(pre: str, extra: list[str], merges: list[str], **more: Any) -> dict[str, Any]:
    tokens = [*BYTES, *extra, "<s>", "</s>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'", "S", "Ġ1234", "Ċ", "Ċ", "x", "Ġdon", "'t"]),
        ("smollm", ["It", "'", "S", "Ġ", "1", "2", "3", "4", "Ċ", "Ċ", "x", "Ġdon", "'t"]),
        ("llama-bpe", ["It", "'S", "Ġ", "123", "4", "ĊĊ", "x", "Ġdon", "'t"]),
        ("dbrx", ["It", "'S", "Ġ", "123", "4", "ĊĊ", "x", "Ġdon", "'t"]),
        ("qwen2", ["It", "'S", "Ġ", "1", "2", "3", "4", "ĊĊ", "x", "Ġdon", "'t"]),
    ],
)
def test_each_pre_tokenizer_splits_as_its_models_do(pre: str, pieces: list[str]) -> None:
    tokenizer = build_tokenizer(byte_level(pre, [], [])).tokenizer
    splits = tokenizer.pre_tokenizer.pre_tokenize_str("It'S 1234\n\nx don't")
    assert [piece for piece, _ in splits] == pieces


def test_unicode_is_composed_where_the_models_expect_it() -> None:
    text = "e\u0301"
    assert build_tokenizer(byte_level("qwen2", [], [])).tokenizer.encode(text).tokens == ["Ã", "©"]
    assert len(build_tokenizer(byte_level("gpt-2", [], [])).tokenizer.encode(text).ids) == 3


def test_a_whole_word_in_the_vocabulary_of_llama3_skips_the_merges() -> None:
    llama = build_tokenizer(byte_level("llama-bpe", ["word"], [], add_bos_token=False)).tokenizer
    other = build_tokenizer(byte_level("gpt-2", ["word"], [])).tokenizer
    assert llama.encode("word").tokens == ["word"]
    assert other.encode("word").tokens == list("word")


def test_bos_is_added_when_the_metadata_or_the_family_says_so() -> None:
    assert build_tokenizer(byte_level("llama-bpe", [], [])).tokenizer.encode("a").tokens == ["<s>", "a"]
    assert build_tokenizer(byte_level("gpt-2", [], [])).tokenizer.encode("a").tokens == ["a"]
    both = build_tokenizer(byte_level("gpt-2", [], [], add_bos_token=True, add_eos_token=True)).tokenizer
    assert both.encode("a").tokens == ["<s>", "a", "</s>"]
    assert both.encode("a", add_special_tokens=False).tokens == ["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "unheard-of"}, "tokenizer.ggml.pre: unheard-of .*smollm"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model: rwkv"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.merges": ["a b"]}, "'ab', which is no token"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'', which is no token|'ab', which is no token"),
        ({"tokenizer.ggml.token_type": [1]}, "differ in length"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "eos_token_id 9999"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        build_tokenizer({**byte_level("gpt-2", [], []), **change})


def sentence_piece() -> dict[str, Any]:
    pieces = {"▁": -1.0, "h": -30.0, "e": -31.0, "l": -32.0, "o": -33.0, "▁h": -9.0, "el": -5.0}
    pieces |= {"lo": -4.0, "▁hel": -3.0, "ello": -20.0, "▁hello": -2.0, "▁he": -8.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<tool>"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()) + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentence_piece_text_is_merged_by_score_with_bytes_for_the_rest() -> None:
    tokenizer = build_tokenizer(sentence_piece()).tokenizer
    encoding = tokenizer.encode("hello é")
    assert encoding.tokens == ["<s>", "▁hello", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoding.ids) == "hello é"


def test_user_defined_pieces_are_whole_but_not_special() -> None:
    tokenizer = build_tokenizer(sentence_piece()).tokenizer
    ids = tokenizer.encode("hello<tool>", add_special_tokens=False).ids
    assert ids[-1] == len(sentence_piece()["tokenizer.ggml.tokens"]) - 1
    assert tokenizer.decode(ids).endswith("<tool>")


def test_the_pair_with_the_better_score_is_merged_first() -> None:
    tokens, scores = ["a", "b", "c", "ab", "bc", "abc"], [-9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
    assert merges_from_scores(tokens, [1] * 6, scores) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


# No text that starts with a space: transformers merges that space with the added one, SentencePiece does not.
@pytest.mark.parametrize("text", ["hello", "hello hello", "hell  hel", "Hello é", "lolo ohel"])
def test_sentence_piece_tokens_equal_those_of_transformers(text: str) -> None:
    metadata = sentence_piece()
    reference = sentencepiece_tokenizer(
        {
            "tokenizer_type": "llama",
            "tokens": metadata["tokenizer.ggml.tokens"],
            "scores": metadata["tokenizer.ggml.scores"],
            "token_type": metadata["tokenizer.ggml.token_type"],
        }
    )
    expected = reference.encode(text, add_special_tokens=False)
    assert build_tokenizer(metadata).tokenizer.encode(text, add_special_tokens=False).ids == expected


def test_a_space_at_the_start_stays_beside_the_added_one() -> None:
    tokenizer = build_tokenizer(sentence_piece()).tokenizer
    ids = tokenizer.encode(" hell", add_special_tokens=False)
    assert ids.tokens == ["▁", "▁hel", "l"]
    assert tokenizer.decode(ids.ids) == " hell"


def test_a_tokenizer_needs_scores_when_it_has_no_merges() -> None:
    with pytest.raises(ModelLoadError, match="scores"):
        build_tokenizer({**sentence_piece(), "tokenizer.ggml.scores": [0.0]})


def gemma() -> dict[str, Any]:
    """Spaces are not prefixed, and runs of spaces or newlines are pieces of their own."""
    normal = ["▁", "h", "e", "l", "o", "el", "lo", "▁h", "▁hel", "▁hello", "hel", "\n"]
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    runs = ["  ", "   ", "\n\n"]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *runs, *normal]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [3, 3, 3, 2, 3, 3, *[6] * 256, *[4] * len(runs), *[1] * len(normal)],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }


@pytest.mark.parametrize(
    "text",
    ["hello", " hello", "hello hello  hel", "hel\n\nhello\n   lo é", "<start_of_turn>hello<end_of_turn>\n"],
)
def test_text_of_gemma_is_tokenized_as_transformers_does_and_comes_back(text: str) -> None:
    metadata = gemma()
    fields = {name: metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")}
    expected = gemma_tokenizer({"tokenizer_type": "llama", **fields})
    expected.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    expected.add_tokens(["\n\n"])
    tokenizer = build_tokenizer(metadata).tokenizer
    ids = tokenizer.encode(text).ids
    assert ids[0] == 2
    assert ids[1:] == expected.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
