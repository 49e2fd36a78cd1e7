"""What a client sees of a journal."""

from __future__ import annotations

from fake_scheduler import byte_tokenizer

from sfllm_gateway.detokenize import Detokenizers
from sfllm_gateway.journal import ChoiceJournal
from sfllm_gateway.output import ChoiceOutput

BYTES = byte_tokenizer()


def test_the_last_allowed_token_is_shown_together_with_the_end() -> None:
    journal = ChoiceJournal()
    output = ChoiceOutput(journal, Detokenizers(BYTES).make(True), max_tokens=2)
    journal.ids.append(ord("a"))
    assert output.unread
    assert output.advance().text == "a"
    journal.ids.append(ord("b"))
    assert not output.unread
    journal.finish_reason = "length"
    assert output.unread
    assert output.advance().text == "b"
    assert output.finished


def test_a_long_backlog_is_read_in_parts_and_ends_with_the_last() -> None:
    journal = ChoiceJournal()
    output = ChoiceOutput(journal, Detokenizers(BYTES).make(True), stops=["no"])
    journal.ids.extend(b"abcde")
    journal.finish_reason = "length"
    assert output.advance(3).text == "abc"
    assert (output.unread, output.finished) == (True, False)
    assert output.advance(3).text == "de"
    assert (output.unread, output.finished) == (False, True)


def test_a_stop_string_across_two_parts_is_found() -> None:
    journal = ChoiceJournal()
    output = ChoiceOutput(journal, Detokenizers(BYTES).make(True), stops=["cd"])
    journal.ids.extend(b"abcdef")
    assert output.advance(3).text == "ab"
    advance = output.advance(3)
    assert (advance.text, advance.kept_tokens) == ("", 4)
