"""Calls of models in whose vocabulary the marks around calls and thinking are special tokens."""

from __future__ import annotations

import msgspec
import pytest
from fake_scheduler import byte_tokenizer
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from sfllm_gateway.detokenize import Detokenizers
from sfllm_gateway.grammar_jobs import GrammarJob
from sfllm_gateway.grammar_process import try_out
from sfllm_gateway.openai.answer_grammar import Thinking, composed, with_thinking
from sfllm_gateway.openai.tool_fields import Function
from sfllm_gateway.openai.tools import Calls, calls_lark
from sfllm_gateway.parsing.formats import FORMATS, HERMES, LLAMA3, MISTRAL, CallFormat
from sfllm_gateway.parsing.tool_calls import ToolCallParser

MARKS = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>")
TOKENIZER = byte_tokenizer()
TOKENIZER.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
DETOKENIZERS = Detokenizers(TOKENIZER)
SPECIAL = DETOKENIZERS.special
FOLLOWER = LLTokenizer(TOKENIZER.to_str(), eos_token=[257])
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALLS = Calls([(0, Function(name="get", parameters=CITY)), (1, Function(name="stop"))], required=True)
ARGUMENTS = '{"city": "Oslo"}'


def follows(grammar: str, text: str) -> bool:
    matcher = LLMatcher(FOLLOWER, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    return bool(matcher.consume_tokens(ids)) and matcher.is_accepting()


def written(form: CallFormat) -> str:
    call = f'{{"name": "get", "{form.arguments}": {ARGUMENTS}}}'
    if form is LLAMA3:
        return call
    return f"{form.opener}[{call}]" if form is MISTRAL else f"{form.opener}\n{call}\n{form.closer}"


@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("thinking", [Thinking(False, False), Thinking(True, False), Thinking(True, True)])
def test_marks_are_tokens_in_the_grammar_and_reach_the_parser(form: CallFormat, thinking: Thinking) -> None:
    rules = calls_lark(CALLS, form, SPECIAL)
    grammar = composed(with_thinking("calls", rules, thinking, SPECIAL))
    before = "<think>" if thinking.possible and not thinking.inside else ""
    before += "Hm, {.</think>\n\n" if thinking.possible else ""
    assert follows(grammar, before + written(form))
    assert not follows(grammar, before + written(form).replace('"Oslo"', "5"))
    job = GrammarJob("grammar", f"start: calls\n{rules}", vocab_size=TOKENIZER.get_vocab_size())
    assert not try_out(job).error
    ids = TOKENIZER.encode(written(form), add_special_tokens=False).ids
    shown = DETOKENIZERS.make(True, form.marks).feed([256, *ids])
    parser = ToolCallParser(form, CALLS.names, str)
    (first, *rest) = parser.feed(shown).calls
    assert "".join(part.arguments for part in (first, *rest)) == ARGUMENTS
    assert parser.finish("stop")[1] == "tool_calls"


def test_a_mark_that_is_no_special_token_is_matched_by_its_text() -> None:
    grammar = composed(with_thinking("calls", calls_lark(CALLS, HERMES, {}), Thinking(False, False), {}))
    follower = LLTokenizer(byte_tokenizer().to_str(), eos_token=[257])
    matcher = LLMatcher(follower, grammar, log_level=0)
    assert matcher.consume_tokens(list(written(HERMES).encode()))
    assert matcher.is_accepting()
    assert msgspec.json.decode(grammar)["grammars"]


def test_only_the_special_tokens_that_are_asked_for_are_shown() -> None:
    ids = [SPECIAL["[TOOL_CALLS]"], 97, SPECIAL["[ARGS]"], SPECIAL["<think>"], 98]
    assert DETOKENIZERS.make(True, MISTRAL.marks).feed(ids) == "[TOOL_CALLS]a[ARGS]b"
    assert DETOKENIZERS.make(True).feed(ids) == "ab"
    assert DETOKENIZERS.make(False, MISTRAL.marks).feed(ids) == "[TOOL_CALLS]a[ARGS]<think>b"
