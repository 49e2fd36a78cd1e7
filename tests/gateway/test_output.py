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
