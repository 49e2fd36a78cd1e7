"""Builds a `tokenizer.json` from the vocabulary in a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sfllm_worker.model.errors import ModelLoadError


class TokenType(IntEnum):
    """Kinds of tokens in `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level BPE vocabulary wants its text split before merging."""

    pattern: str | None = None
    """Split by this pattern; None is GPT-2's, which is built into the byte-level step."""
    single_digits: bool = False
    """Whether every digit stands alone before the pattern is applied."""
    compose: bool = False
    """Whether text is normalized to NFC first."""
    whole_words: bool = False
    """Whether a word that is itself in the vocabulary skips the merges."""
    adds_bos: bool = False
    """Whether a text starts with BOS when the metadata does not say."""


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = PreTokenizer(
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}", whole_words=True, adds_bos=True
)
_QWEN2 = PreTokenizer(rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}", compose=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer(),
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(single_digits=True),
    "starcoder": PreTokenizer(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "dbrx": PreTokenizer(_LLAMA3.pattern),  # Phi-4's too
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""By `tokenizer.ggml.pre`. The patterns are those of the models' published tokenizers."""


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer as the files that a Hugging Face directory has for it."""

    tokenizer: Tokenizer
    config: dict[str, str | bool]
    """The contents of `tokenizer_config.json`."""
    chat_template: str | None


def build_tokenizer(metadata: Mapping[str, Any]) -> GgufTokenizer:
    """Build the tokenizer of a GGUF file. Raises `ModelLoadError` for kinds that are not supported."""
    vocabulary = _Vocabulary(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        pre = _pre_tokenizer(metadata)
        tokenizer, adds_bos = _byte_level(vocabulary, metadata, pre), pre.adds_bos
    elif kind == "llama":
        tokenizer, adds_bos = _sentence_piece(vocabulary, metadata), True
    else:
        raise ModelLoadError(f"unsupported tokenizer.ggml.model: {kind} (supported: gpt2, llama)")
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in vocabulary.of(TokenType.CONTROL)]
    )
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in vocabulary.of(TokenType.USER_DEFINED)]
    )
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    _add_ends(tokenizer, vocabulary, add_bos=add_bos, add_eos=add_eos)
    config: dict[str, str | bool] = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    for name, key in _TOKEN_KEYS.items():
        text = vocabulary.named(key)
        if text is not None:
            config[name] = text
    template = metadata.get("tokenizer.chat_template")
    return GgufTokenizer(tokenizer, config, template if isinstance(template, str) else None)


_TOKEN_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class _Vocabulary:
    def __init__(self, metadata: Mapping[str, Any]) -> None:
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise ModelLoadError("tokenizer.ggml.tokens is missing")
        self.tokens: Sequence[str] = tokens
        self.types: Sequence[int] = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(
            tokens
        )
        if len(self.types) != len(tokens):
            raise ModelLoadError("tokenizer.ggml.token_type and tokens differ in length")
        self.ids = {token: index for index, token in enumerate(tokens)}
        if len(self.ids) != len(tokens):
            raise ModelLoadError("tokenizer.ggml.tokens holds a token twice")
        self._metadata = metadata

    def of(self, kind: TokenType) -> list[str]:
        return [token for token, number in zip(self.tokens, self.types, strict=True) if number == kind]

    def named(self, key: str) -> str | None:
        """The text of a token that the metadata names by id."""
        index = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(index, int):
            return None
        if not 0 <= index < len(self.tokens):
            raise ModelLoadError(f"tokenizer.ggml.{key} {index} is not in the vocabulary")
        return self.tokens[index]


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ModelLoadError(
            f"unsupported tokenizer.ggml.pre: {name} (supported: {', '.join(PRE_TOKENIZERS)})"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(vocabulary: _Vocabulary, metadata: Mapping[str, Any], pre: PreTokenizer) -> Tokenizer:
    """A BPE over bytes written as printable characters, with the merges that the file lists."""
    lines = metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise ModelLoadError("tokenizer.ggml.merges is missing")
    merges = []
    for line in lines:
        left, _, right = str(line).partition(" ")  # a piece holds no space: bytes are written as letters
        unknown = [piece for piece in (left, right, left + right) if piece not in vocabulary.ids]
        if unknown:
            raise ModelLoadError(f"tokenizer.ggml.merges: {line!r} needs {unknown[0]!r}, which is no token")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(dict(vocabulary.ids), merges, ignore_merges=pre.whole_words))
    if pre.compose:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.pattern), "isolated"))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pre.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(vocabulary: _Vocabulary, metadata: Mapping[str, Any]) -> Tokenizer:
    """A BPE over characters with `▁` for spaces, falling back to byte tokens.

    The file has a score per token instead of merges: the pair that makes the best-scored token is
    merged first, which is what SentencePiece does.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise ModelLoadError("tokenizer.ggml.scores is missing or of another length than the tokens")
    unknown = vocabulary.named("unknown_token_id") or next(iter(vocabulary.of(TokenType.UNKNOWN)), None)
    tokenizer = Tokenizer(
        models.BPE(
            dict(vocabulary.ids),
            merges_from_scores(vocabulary.tokens, vocabulary.types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefixed else spaces
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    if unknown is not None:
        tokenizer.add_special_tokens([AddedToken(unknown, normalized=False, special=True)])
    return tokenizer


def merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every split of a normal token into two known ones, best score of the whole first.

    Splits of one token go by the ids of their parts, so that the result does not depend on anything else.
    """
    ids = {token: i for i, token in enumerate(tokens) if types[i] == TokenType.NORMAL}
    ranked = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], left, right))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, left, right in ranked]


def _add_ends(tokenizer: Tokenizer, vocabulary: _Vocabulary, *, add_bos: bool, add_eos: bool) -> None:
    """Make encoding add BOS or EOS where the model was trained with them."""
    bos = vocabulary.named("bos_token_id") if add_bos else None
    eos = vocabulary.named("eos_token_id") if add_eos else None
    ends = [text for text in (bos, eos) if text is not None]
    if not ends:
        return
    template = " ".join(part for part in (bos, "$A", eos) if part is not None)
    pair = " ".join(part for part in (bos, "$A", eos, bos, "$B", eos) if part is not None)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template.split(" "),
        pair=[f"{part}:1" if part == "$B" else part for part in pair.split(" ")],
        special_tokens=[(text, vocabulary.ids[text]) for text in dict.fromkeys(ends)],
    )
