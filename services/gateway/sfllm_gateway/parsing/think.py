"""Telling a model's thinking from its answer: what stands between <think> and </think>."""

from __future__ import annotations

import enum

from sfllm_gateway.parsing.deltas import Delta, OutputParser
from sfllm_gateway.parsing.marks import MOST_SPACE, SPACE, held_back, without_space

OPENER, CLOSER = "<think>", "</think>"


class _Mode(enum.Enum):
    START = enum.auto()
    THINKING = enum.auto()
    GAP = enum.auto()
    """Space between the thinking and the answer."""
    ANSWER = enum.auto()


class ThinkParser:
    """Reads one choice; what is no thinking goes to `answer`. With `inside`, the prompt has opened it.

    Thinking is passed on unless `hides` it. Space around it is left out.
    """

    def __init__(self, answer: OutputParser, inside: bool = False, hides: bool = False) -> None:
        self._answer = answer
        self._hides = hides
        self._mode = _Mode.THINKING if inside else _Mode.START
        self._text = ""
        self._shown = False
        self._taken = 0  # characters so far
        self._thought = 0  # of these, thinking

    def feed(self, text: str) -> Delta:
        """Take further text."""
        if self._mode is _Mode.ANSWER:
            return self._answer.feed(text)
        self._text += text
        self._taken += len(text)
        if self._mode is _Mode.START and not self._read_start():
            return Delta()
        reasoning, thought = "", 0
        if self._mode is _Mode.THINKING:
            reasoning, end = self._read_thinking()
            thought, self._thought = end - self._thought, end
        if self._mode is _Mode.GAP:
            self._text = self._text.lstrip(SPACE)
            if self._text:
                self._mode = _Mode.ANSWER
        if self._mode is _Mode.ANSWER:
            rest, self._text = self._text, ""
            return self._answer.feed(rest)._replace(reasoning=reasoning, thought=thought)
        return Delta(reasoning=reasoning, thought=thought)

    def finish(self, reason: str) -> tuple[Delta, str]:
        """What was held back, and the reason of the end."""
        thinking = ""
        if self._mode is _Mode.THINKING and not self._hides:
            thinking = self._text.rstrip(SPACE) if self._shown else self._text.strip(SPACE)
        first = self._answer.feed(self._text) if self._mode is _Mode.START else Delta()
        last, reason = self._answer.finish(reason)
        return Delta(first.content + last.content, thinking, (*first.calls, *last.calls)), reason

    def _read_start(self) -> bool:
        """Whether it is known by now if the answer begins with thinking."""
        rest = self._text.lstrip(SPACE)
        if rest.startswith(OPENER) and len(self._text) - len(rest) <= MOST_SPACE:
            self._mode, self._text = _Mode.THINKING, rest[len(OPENER) :]
            return True
        if OPENER.startswith(rest) and len(self._text) - len(rest) <= MOST_SPACE:
            return False
        self._mode = _Mode.ANSWER
        return True

    def _read_thinking(self) -> tuple[str, int]:
        """Further thinking to show, and how many of the characters so far are thinking."""
        end = self._taken
        if not self._shown:
            self._text = self._text.lstrip(SPACE)
        place = self._text.find(CLOSER)
        if place >= 0:
            thinking, self._text = without_space(self._text[:place]), self._text[place + len(CLOSER) :]
            self._mode = _Mode.GAP
            end -= len(self._text)
        else:
            kept = held_back(self._text, CLOSER)
            thinking, self._text = self._text[: len(self._text) - kept], self._text[len(self._text) - kept :]
        self._shown = self._shown or bool(thinking)
        return "" if self._hides else thinking, end
