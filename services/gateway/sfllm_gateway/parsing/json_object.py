"""Reading one JSON object character by character, strictly, and watching its own fields go by.

A call can be passed on while the model still writes it only if nothing that was passed on can turn out to
be no JSON, so every character is held against the grammar of RFC 8259 as it comes.
"""

from __future__ import annotations

import enum
import json
import re

_SPACE = " \t\n\r"
_SCALAR = frozenset("-+.0123456789eEtrufalsn")
_SCALARS = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?|true|false|null", re.ASCII)
_ESCAPED = frozenset('"\\/bfnrtu')
MAX_DEPTH = 64


class _At(enum.Enum):
    """What may come next."""

    OBJECT = enum.auto()
    FIRST_KEY = enum.auto()
    KEY = enum.auto()
    COLON = enum.auto()
    VALUE = enum.auto()
    FIRST_ITEM = enum.auto()
    AFTER_VALUE = enum.auto()
    END = enum.auto()


class ObjectReader:
    """Takes characters until the object is `complete`. `fields` has the text of each finished field's value.

    `open_field` is the field whose value is being read. A field that comes twice has no meaning: such an
    object is refused.
    """

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.open_field: str | None = None
        self._open: list[str] = []
        self._at = _At.OBJECT
        self._stack: list[str] = []
        self._token: list[str] = []
        self._in_string = False
        self._escape = 0  # characters of an escape sequence that are still to come
        self._is_key = False

    @property
    def complete(self) -> bool:
        """Whether the object is closed."""
        return self._at is _At.END

    @property
    def open_first(self) -> str:
        """The first character of the value that is being read, "" before it came."""
        return self._open[0] if self._open else ""

    def open_since(self, start: int) -> str:
        """The value that is being read, from its character `start` on, as far as it came."""
        return "".join(self._open[start:])

    def feed(self, character: str) -> bool:
        """Take the next character. False when this is no JSON object; nothing more may be fed then."""
        if self.complete:
            return False
        if self._in_string:
            return self._feed_string(character)
        if self._token and character not in _SCALAR and not self._end_scalar():
            return False
        if character in _SPACE:
            self._keep(character)
            return True
        return self._feed_mark(character)

    def _feed_string(self, character: str) -> bool:
        self._keep(character)
        self._token.append(character)
        if self._escape:
            if self._escape == 1 and self._token[-2] == "\\":
                if character not in _ESCAPED:
                    return False
                self._escape = 4 if character == "u" else 0
                return True
            self._escape -= 1
            return character in "0123456789abcdefABCDEF"
        if character == "\\":
            self._escape = 1
        elif character == '"':
            return self._end_string()
        return character >= " "

    def _end_string(self) -> bool:
        self._in_string = False
        text, self._token = "".join(self._token), []
        if not self._is_key:
            self._end_value()
            return True
        self._at = _At.COLON
        if len(self._stack) == 1:
            self.open_field, self._open = str(json.loads(text)), []
        return self.open_field not in self.fields

    def _feed_mark(self, character: str) -> bool:
        at = self._at
        if at is _At.OBJECT:
            return self._push(character) if character == "{" else False
        if at in {_At.FIRST_KEY, _At.KEY}:
            if character == "}" and at is _At.FIRST_KEY:
                return self._pop(character)
            self._keep(character)
            self._begin_string(is_key=True)
            return character == '"'
        if at is _At.COLON:
            self._at = _At.VALUE
            if len(self._stack) > 1:
                self._keep(character)
            return character == ":"
        if at is _At.AFTER_VALUE:
            return self._feed_after_value(character)
        return self._feed_value(character)

    def _feed_value(self, character: str) -> bool:
        if character == "]" and self._at is _At.FIRST_ITEM:
            return self._pop(character)
        if character in "{[":
            return self._push(character)
        self._keep(character)
        if character == '"':
            self._begin_string(is_key=False)
        else:
            self._token.append(character)
        return character == '"' or character in _SCALAR

    def _feed_after_value(self, character: str) -> bool:
        if character == ",":
            if len(self._stack) > 1:
                self._keep(character)
            self._at = _At.KEY if self._stack[-1] == "{" else _At.VALUE
            return True
        return self._pop(character) if character in "}]" else False

    def _begin_string(self, is_key: bool) -> None:
        self._in_string, self._is_key, self._token = True, is_key, ['"']

    def _end_scalar(self) -> bool:
        text, self._token = "".join(self._token), []
        self._end_value()
        return _SCALARS.fullmatch(text) is not None

    def _push(self, character: str) -> bool:
        if self._stack:
            self._keep(character)
        self._stack.append(character)
        self._at = _At.FIRST_KEY if character == "{" else _At.FIRST_ITEM
        return len(self._stack) <= MAX_DEPTH

    def _pop(self, character: str) -> bool:
        if {"}": "{", "]": "["}[character] != self._stack.pop():
            return False
        if not self._stack:
            self._at = _At.END
            return True
        self._keep(character)
        self._end_value()
        return True

    def _end_value(self) -> None:
        self._at = _At.AFTER_VALUE
        if len(self._stack) == 1 and self.open_field is not None:
            self.fields[self.open_field] = "".join(self._open)
            self.open_field, self._open = None, []

    def _keep(self, character: str) -> None:
        """Of the open field's value, without the space before it."""
        if (
            self.open_field is not None
            and self._at is not _At.COLON
            and (self._open or character not in _SPACE)
        ):
            self._open.append(character)
