"""How models write tool calls: marks around JSON objects, by family."""

from __future__ import annotations

import re
from typing import NamedTuple


class CallFormat(NamedTuple):
    """A family's way to write calls.

    Each call, or the list of them, begins with `opener`; `bare` models may leave it out where an answer
    begins. `arguments` is what the field with the arguments is called. `closers` and `separators` may stand
    behind a call. With `bracket`, calls may stand in a list; with `named`, a function's name may stand before
    an object that has only the arguments. `special` says that the opener is a special token of the model.
    """

    name: str
    opener: str
    arguments: str = "arguments"
    bare: bool = False
    closer: str = ""
    separator: str = ""
    bracket: bool = False
    named: bool = False
    special: bool = False

    @property
    def marks(self) -> frozenset[str]:
        """Texts that have a meaning, and may be special tokens of a model."""
        between = ("[CALL_ID]", "[ARGS]") if self.named else ()
        return frozenset(mark for mark in (self.opener, self.closer, *between) if mark)


HERMES = CallFormat("hermes", "<tool_call>", closer="</tool_call>")
"""Hermes 2 Pro and later, Qwen 2.5 and 3."""

LLAMA3 = CallFormat("llama3", "<|python_tag|>", "parameters", bare=True, separator=";", special=True)
"""Llama 3.1 and later, which write bare JSON."""

MISTRAL = CallFormat("mistral", "[TOOL_CALLS]", separator=",", bracket=True, named=True, special=True)
"""Mistral: a list of objects, or since its eleventh tokenizer names before arguments."""

FORMATS = {form.name: form for form in (HERMES, LLAMA3, MISTRAL)}

NAME_BEFORE_ARGUMENTS = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w*)?\s*(?:\[ARGS\])?\s*", re.ASCII)
"""What stands before the arguments in Mistral's newer form: the name, and marks that not all models write."""


def format_of(template: str) -> CallFormat:
    """The format that a chat template teaches its model; else that of Hermes, which many know."""
    if MISTRAL.opener in template:
        return MISTRAL
    if "<|python_tag|>" in template or "<|start_header_id|>" in template:
        return LLAMA3
    return HERMES
