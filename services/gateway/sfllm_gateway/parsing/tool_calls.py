"""Finding tool calls in text that arrives in pieces: one machine for streams and whole answers.

A call is told of as soon as its name is known and that its arguments are an object; those follow as they
come, held strictly against JSON. What looks like a call and turns out to be none before that is content.
All of this is decided character by character, so that it does not depend on the pieces.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection

from sfllm_gateway.parsing.call_object import CallReader
from sfllm_gateway.parsing.deltas import CallDelta, Delta
from sfllm_gateway.parsing.formats import NAME_BEFORE_ARGUMENTS, CallFormat
from sfllm_gateway.parsing.marks import MOST_SPACE, SPACE, held_back, without_space

MAX_CALLS = 128

LONGEST_MARKS = 96
"""Characters between a name and its arguments."""


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
    After the first `most` calls, further ones are left out.
    """

    def __init__(
        self,
        form: CallFormat,
        names: Collection[str],
        make_id: Callable[[int], str],
        as_stop: bool = False,
        most: int = MAX_CALLS,
    ) -> None:
        self._form = form
        self._names = names
        self._make_id = make_id
        self._as_stop = as_stop
        self._most = most
        self._longest_head = max(map(len, names), default=0) + LONGEST_MARKS
        self._mode = _Mode.TEXT
        self._begun = False
        self._number = 0
        self._broken = False
        self._content: list[str] = []
        self._found: list[CallDelta] = []
        self._text = ""  # not yet understood
        self._raw: list[str] = []  # since the opener, to be content if it is no call
        self._marked = False
        self._listed = False
        self._call = CallReader(names)

    def feed(self, text: str) -> Delta:
        """Take further text."""
        self._text += text
        while self._text and self._step():
            pass
        return self._take()

    def finish(self, reason: str) -> tuple[Delta, str]:
        """What was held back, and the reason of the end."""
        if self._mode is not _Mode.TEXT:
            if reason == "length" and self._marked:  # a call that was cut off before its name was known
                self._raw, self._text = [], ""
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
            space = len(self._text) - len(rest)
            self._begun = space > MOST_SPACE
            if not rest and not self._begun:
                return False
            if rest.startswith("{") and not self._begun:
                self._open(space, 0)
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
        """A call begins: what stands before it is content, but for the space between.

        An opener that is a special token is not shown, whether a call follows or not.
        """
        self._begun = True
        before = self._text[:place]
        stripped = without_space(before)
        self._content.append(stripped)
        self._raw = [before[len(stripped) :]]
        self._advance(place, 0)
        self._advance(length, 0 if self._form.special else length)
        self._marked = length > 0
        self._listed = False
        self._call = CallReader(self._names)
        self._mode = _Mode.BEFORE

    def _advance(self, count: int, kept: int) -> None:
        """`count` characters are understood, of which the last `kept` may still have to be content."""
        if kept:
            self._raw.append(self._text[count - kept : count])
        self._text = self._text[count:]

    def _read_before(self) -> bool:
        space = len(self._text) - len(self._text.lstrip(SPACE))
        self._advance(space, space)
        if not self._text:
            return False
        if self._text[0] == "{":
            self._mode = _Mode.OBJECT
        elif self._listed:
            self._give_up()
        elif self._text[0] == "[" and self._form.bracket:
            self._listed = True
            self._advance(1, 1)
        elif self._form.named:
            self._mode = _Mode.NAME
        else:
            self._give_up()
        return True

    def _read_name(self) -> bool:
        """A function's name up to its arguments."""
        place = self._text.find("{")
        head = self._text if place < 0 else self._text[:place]
        if len(head) > self._longest_head:
            self._give_up()
            return True
        if place < 0:
            return False
        found = NAME_BEFORE_ARGUMENTS.fullmatch(head)
        if found is None or found[1] not in self._names:
            self._give_up()
            return True
        self._call.name = found[1]
        self._advance(place, place)
        self._mode = _Mode.OBJECT
        return True

    def _read_object(self) -> bool:
        call = self._call
        for count, character in enumerate(self._text, start=1):
            if not call.feed(character) or (not call.told and self._is_none(call)):
                self._advance(count - 1, 0 if call.told else count - 1)
                self._give_up()
                return True
            if call.reader.complete:
                self._advance(count, 0 if call.told else count)
                self._end_call()
                return True
        self._advance(len(self._text), 0 if call.told else len(self._text))
        self._tell()
        return False

    def _is_none(self, call: CallReader) -> bool:
        """Whether an object can be no call any longer: JSON of another kind need not be held back."""
        return call.is_none or (call.is_other and not self._marked and self._number == 0)

    def _end_call(self) -> None:
        call = self._call
        if not call.told and not call.end():
            self._give_up()
            return
        self._tell()
        self._number += 1
        self._raw = []
        self._call = CallReader(self._names)
        self._mode = _Mode.AFTER

    def _tell(self) -> None:
        """Pass on what is known of the call."""
        call = self._call
        if not call.told:
            return
        begins, fresh = call.shown == 0, call.take()
        if self._number < self._most and fresh:
            identity = self._make_id(self._number) if begins else ""
            name = call.function or "" if begins else ""
            self._found.append(CallDelta(self._number, identity, name, fresh))

    def _read_after(self) -> bool:
        rest = self._text.lstrip(SPACE)
        form = self._form
        marks = [
            mark for mark in (form.closer, form.opener, form.separator, "]" if self._listed else "") if mark
        ]
        space = len(self._text) - len(rest)
        if not rest:
            self._advance(space, 0)
            return False
        if any(mark.startswith(rest) and mark != rest for mark in marks):
            return False
        if form.closer and rest.startswith(form.closer):
            self._advance(space + len(form.closer), 0)
        elif self._listed and rest[0] == "]":
            self._advance(space + 1, 0)
            self._listed = False
        elif rest.startswith(form.opener) and self._number < MAX_CALLS:
            self._text = rest
            self._open(0, len(form.opener))
        elif form.separator and rest.startswith(form.separator) and self._number < MAX_CALLS:
            self._raw = [form.separator]
            self._advance(space + len(form.separator), 0)
            self._mode = _Mode.BEFORE
        else:
            self._text = rest
            self._mode = _Mode.TEXT
        return True

    def _give_up(self) -> None:
        """It is no call. Unless it was told of already, all of it is content."""
        self._tell()
        if self._call.told:
            self._broken = self._broken or self._number < self._most
            self._number += 1
        else:
            raw = "".join(self._raw)
            self._content.append(raw.strip(SPACE + self._form.separator) if self._number else raw)
        self._raw = []
        self._call = CallReader(self._names)
        self._mode = _Mode.TEXT
        self._begun = True
