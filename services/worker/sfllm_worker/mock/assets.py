"""The built-in tokenizer and chat template of a mock worker: a token for each byte, and three more.

A token's id is the value of its byte. The files are those that a gateway pulls of any model.
"""

from __future__ import annotations

import json

from sfllm_worker.mock.tokens import EOS_TOKEN, VOCAB_SIZE

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def assets() -> dict[str, bytes]:
    """The files, by name."""
    config = {"eos_token": SPECIALS[0], "pad_token": SPECIALS[0], "add_bos_token": False}
    return {
        TOKENIZER: json.dumps(_tokenizer()).encode(),
        TOKENIZER_CONFIG: json.dumps(config).encode(),
        CHAT_TEMPLATE: _TEMPLATE.encode(),
    }


def _tokenizer() -> dict[str, object]:
    """The contents of a `tokenizer.json`: byte-level BPE without a merge."""
    words = [*_byte_characters(), *SPECIALS]
    assert len(words) == VOCAB_SIZE
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": EOS_TOKEN + index,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, word in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL,
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {word: index for index, word in enumerate(words)},
            "merges": [],
        },
    }


def _byte_characters() -> list[str]:
    """The character by which byte-level tokenizers write each byte.

    Bytes that are printable in Latin-1 stand for themselves; the others, in order, are written as
    the characters from U+0100 on (GPT-2's table).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
