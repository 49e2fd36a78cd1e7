"""Finding tool calls in text that arrives in pieces: one machine for streams and whole answers.

A call's name is passed on as soon as it is known and its arguments as they come, held strictly against
JSON. What looks like a call and turns out to be none, before anything of it was passed on, is content.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Collection

from sfllm_gateway.parsing.deltas import CallDelta, Delta
from sfllm_gateway.parsing.formats import ARGUMENTS_MARK, CallFormat
from sfllm_gateway.parsing.json_object import ObjectReader
from sfllm_gateway.parsing.marks import SPACE, held_back

MAX_CALLS = 128


class _Mode(enum.Enum):
    TEXT = enum.auto()
    BEFORE = enum.auto()
    """After an opener or a separator: a call is to begin."""
    NAME = enum.auto()
    OBJECT = enum.auto()
    AFTER = enum.auto()
    """After a call: closers, separators or text."""


class ToolCallParser:
    """Reads one choice. `names` are the functions that may be called; `make_id` gives a call's id by number.

    `as_stop` keeps "stop" as the reason of a choice with calls, as where the client named the function.
    """

    def __init__(
        self, form: CallFormat, names: Collection[str], make_id: Callable[[int], str], as_stop: bool = False
    ) -> None:
        self._form = form
        self._names = names
        self._make_id = make_id
        self._as_stop = as_stop
        self._mode = _Mode.TEXT
        self._begun = False
        self._number = 0
        self._broken = False
        self._content: list[str] = []
        self._found: list[CallDelta] = []
        self._text = ""  # not yet understood
        self._raw = ""  # since the opener, to be content if it is no call
        self._listed = False
        self._call = _Call()

    def feed(self, text: str) -> Delta:
        """Take further text."""
        self._text += text
        while self._text and self._step():
            pass
        return self._take()

    def finish(self, reason: str) -> tuple[Delta, str]:
        """What was held back, and the reason of the end."""
        if self._mode is not _Mode.TEXT:
            self._give_up()
        self._content.append(self._text if not self._number else self._text.strip(SPACE))
        complete = self._number > 0 and not self._broken
        delta = self._take()
        return delta, "tool_calls" if reason == "stop" and complete and not self._as_stop else reason

    def _take(self) -> Delta:
        delta = Delta("".join(self._content), "", tuple(self._found))
        self._content, self._found = [], []
        return delta

    def _step(self) -> bool:
        """Understand some more of the text; False when more of it is needed."""
        match self._mode:
            case _Mode.TEXT:
                return self._read_text()
            case _Mode.BEFORE:
                return self._read_before()
            case _Mode.NAME:
                return self._read_name()
            case _Mode.OBJECT:
                return self._read_object()
            case _Mode.AFTER:
                return self._read_after()

    def _read_text(self) -> bool:
        if self._form.bare and not self._begun:
            rest = self._text.lstrip(SPACE)
            if not rest:
                return False
            if rest[0] == "{":
                self._begun = True
                self._open(len(self._text) - len(rest), 0)
                return True
        place = self._text.find(self._form.opener)
        if place >= 0 and self._number < MAX_CALLS:
            self._open(place, len(self._form.opener))
            return True
        kept = held_back(self._text, self._form.opener)
        shown = self._text[: len(self._text) - kept]
        if shown.strip(SPACE):
            self._begun = True
        elif self._form.bare and not self._begun:
            return False
        self._content.append(shown)
        self._text = self._text[len(shown) :]
        return False

    def _open(self, place: int, length: int) -> None:
        """A call begins: what stands before it is content, but for the space between."""
        self._begun = True
        before = self._text[:place]
        stripped = before.rstrip(SPACE)
        self._content.append(stripped)
        self._raw = before[len(stripped) :]
        self._advance(place, 0)
        self._advance(length, length)
        self._listed = False
        self._call = _Call()
        self._mode = _Mode.BEFORE

    def _advance(self, count: int, kept: int) -> None:
        """`count` characters are understood, of which the last `kept` may still have to be content."""
        if kept:
            self._raw += self._text[count - kept : count]
        self._text = self._text[count:]

    def _read_before(self) -> bool:
        rest = self._text.lstrip(SPACE)
        if not rest:
            return False
        space = len(self._text) - len(rest)
        if rest[0] == "[" and self._form.bracket and not self._listed:
            self._listed = True
            self._advance(space + 1, space + 1)
            return True
        if rest[0] == "{":
            self._mode = _Mode.OBJECT
        elif self._form.named and not self._listed:
            self._mode = _Mode.NAME
        else:
            self._give_up()
            return True
        self._advance(space, space)
        return True

    def _read_name(self) -> bool:
        """A function's name up to its arguments."""
        place = self._text.find("{")
        head = (self._text if place < 0 else self._text[:place]).strip(SPACE)
        name = head.removesuffix(ARGUMENTS_MARK)
        may_become = any((known + ARGUMENTS_MARK).startswith(head) for known in self._names)
        if not may_become or (place >= 0 and name not in self._names):
            self._give_up()
            return True
        if place < 0:
            return False
        self._call.name = name
        self._advance(place, place)
        self._mode = _Mode.OBJECT
        return True

    def _read_object(self) -> bool:
        call, reader = self._call, self._call.reader
        for count, character in enumerate(self._text, start=1):
            if not reader.feed(character):
                self._advance(count - 1, count - 1)
                self._give_up()
                return True
            call.note(character)
            if reader.complete:
                self._advance(count, count)
                return self._end_call()
        self._advance(len(self._text), len(self._text))
        self._tell(call.name_so_far(), call.ready(self._form.arguments))
        return False

    def _end_call(self) -> bool:
        call = self._call
        name, arguments = call.name_so_far(), call.whole(self._form.arguments)
        if name not in self._names or arguments is None:
            self._give_up()
            return True
        self._tell(name, arguments)
        self._number += 1
        self._raw = ""
        self._call = _Call()
        self._mode = _Mode.AFTER
        return True

    def _tell(self, name: str | None, arguments: str) -> None:
        """Pass on what is known of the call: a prefix of its arguments, once its name is one of the names."""
        call = self._call
        if name not in self._names or (not arguments and not call.told):
            return
        fresh = arguments[call.shown :]
        if not call.told:
            assert name is not None
            self._found.append(CallDelta(self._number, self._make_id(self._number), name, fresh))
        elif fresh:
            self._found.append(CallDelta(self._number, "", "", fresh))
        call.told, call.shown = True, len(arguments)

    def _read_after(self) -> bool:
        rest = self._text.lstrip(SPACE)
        form = self._form
        marks = [
            mark for mark in (form.closer, form.opener, form.separator, "]" if self._listed else "") if mark
        ]
        if not rest or any(mark.startswith(rest) and mark != rest for mark in marks):
            return False
        space = len(self._text) - len(rest)
        if form.closer and rest.startswith(form.closer):
            self._advance(space + len(form.closer), 0)
        elif self._listed and rest[0] == "]":
            self._advance(space + 1, 0)
            self._listed = False
        elif rest.startswith(form.opener) and self._number < MAX_CALLS:
            self._text = rest
            self._open(0, len(form.opener))
        elif form.separator and rest.startswith(form.separator) and self._number < MAX_CALLS:
            self._raw = form.separator
            self._advance(space + len(form.separator), 0)
            self._mode = _Mode.BEFORE
        else:
            self._text = rest
            self._mode = _Mode.TEXT
        return True

    def _give_up(self) -> None:
        """It is no call. Unless something of it was passed on already, all of it is content."""
        if self._call.told:
            self._broken = True
            self._number += 1
        else:
            self._content.append(
                self._raw if not self._number else self._raw.strip(SPACE + self._form.separator)
            )
        self._raw = ""
        self._call = _Call()
        self._mode = _Mode.TEXT
        self._begun = True


class _Call:
    """A call that is being read. `shown` characters of its arguments were passed on, if it was `told` at all.

    `name` is that of a call whose object has only the arguments, else it is a field of the object.
    """

    def __init__(self) -> None:
        self.reader = ObjectReader()
        self.name: str | None = None
        self.told = False
        self.shown = 0
        self._text: list[str] = []

    def note(self, character: str) -> None:
        """A character of the object."""
        self._text.append(character)

    def name_so_far(self) -> str | None:
        """The function's name, once it is whole."""
        if self.name is not None:
            return self.name
        value = self.reader.fields.get("name")
        return str(json.loads(value)) if value is not None and value.startswith('"') else None

    def ready(self, field: str) -> str:
        """As much of the arguments as may be passed on while they are read: an object's text."""
        if self.name is not None:
            return "".join(self._text)
        text = self.reader.fields.get(field)
        if text is None and self.reader.open_field == field:
            text = self.reader.open_text.lstrip(SPACE).rstrip(SPACE)
        return text if text is not None and text.startswith("{") else ""

    def whole(self, field: str) -> str | None:
        """The arguments as JSON text of an object, None if they are something else. None at all are {}."""
        if self.name is not None:
            return "".join(self._text)
        text = self.reader.fields.get(field, "{}")
        if text.startswith('"'):  # some models write the text of an object
            text = str(json.loads(text))
            return text if _is_object(text) else None
        return text if text.startswith("{") else None


def _is_object(text: str) -> bool:
    reader = ObjectReader()
    return all(map(reader.feed, text.strip(SPACE))) and reader.complete
