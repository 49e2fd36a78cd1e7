"""The JSON object of a tool call, read character by character."""

from __future__ import annotations

import json
from collections.abc import Collection

from sfllm_gateway.parsing.json_object import ObjectReader
from sfllm_gateway.parsing.marks import SPACE

ARGUMENTS = ("arguments", "parameters")
"""What models call the field, whatever they were taught."""

CALL_FIELDS = frozenset({"name", "type", "id", *ARGUMENTS})


class CallReader:
    """A call that is being read. Once it is `told`, `take` gives its arguments as they come.

    `name` is set for a call whose object has only the arguments; else it is a field of the object.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.reader = ObjectReader()
        self.name: str | None = None
        self.told = False
        self.shown = 0
        self._names = names
        self._function: str | None = None
        self._pieces: list[str] = []  # of arguments that are not a field with an object

    @property
    def function(self) -> str | None:
        """The name of the function, once it is known to be one that may be called."""
        if self.name is not None:
            return self.name
        if self._function is None and (value := self.reader.fields.get("name", "")).startswith('"'):
            name = str(json.loads(value))
            self._function = name if name in self._names else None
        return self._function

    @property
    def is_none(self) -> bool:
        """Whether it names another function than those that may be called."""
        return "name" in self.reader.fields and self.function is None

    @property
    def is_other(self) -> bool:
        """Whether it has a field that no call has."""
        return self.reader.open_field is not None and self.reader.open_field not in CALL_FIELDS

    def feed(self, character: str) -> bool:
        """Take the next character of the object. False if it is none."""
        if not self.reader.feed(character):
            return False
        if self.name is not None:
            self._pieces.append(character)
            self.told = True
        elif not self.told and (field := self._field()) is not None:
            first = self.reader.fields.get(field) or self.reader.open_first
            self.told = first.startswith("{") and self.function is not None
        return True

    def take(self) -> str:
        """The arguments, from where the last call of this method ended."""
        fields, field = self.reader.fields, self._field()
        if self._pieces or field is None:
            fresh = "".join(self._pieces[self.shown :])
        elif field in fields:
            fresh = fields[field][self.shown :]
        else:
            fresh = self.reader.open_since(self.shown)
        self.shown += len(fresh)
        return fresh

    def end(self) -> bool:
        """Whether an object that is complete is a call after all: without arguments, or with their text."""
        field = self._field()
        text = "{}" if field is None else self.reader.fields[field]
        if text.startswith('"'):  # some models write the text of an object
            text = str(json.loads(text)).strip(SPACE)
        self.told = self.function is not None and _is_object(text)
        self._pieces = list(text)
        return self.told

    def _field(self) -> str | None:
        """The field with the arguments: the first one with such a name."""
        fields = self.reader.fields
        found = next((name for name in fields if name in ARGUMENTS), self.reader.open_field)
        return found if found in ARGUMENTS else None


def _is_object(text: str) -> bool:
    """Whether a text is an object that can be passed on: half of a surrogate pair could not be."""
    reader = ObjectReader()
    encodable = not any("\ud800" <= character <= "\udfff" for character in text)
    return encodable and all(map(reader.feed, text)) and reader.complete
