"""What the process that tries out grammars is asked, and what it answers."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["json", "regex", "choice", "grammar"]
"""What a text is: a JSON schema, a regular expression, a JSON list of texts, or Lark or GBNF."""


class GrammarJob(msgspec.Struct, array_like=True, frozen=True):
    """A text that says what an answer may be.

    `special_tokens` are what a grammar may call by name, `vocab_size` bounds what it may call by id.
    `whitespace` is a regular expression for what may stand between the parts of JSON, "" for nothing.
    """

    kind: Kind
    text: str
    whitespace: str = ""
    special_tokens: tuple[str, ...] = ()
    vocab_size: int = 0


class GrammarResult(msgspec.Struct, array_like=True, frozen=True):
    """The grammar in llguidance's form; or what is wrong with the text, for the client."""

    grammar: str
    error: str = ""
