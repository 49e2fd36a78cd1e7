"""What a mock worker says: made up, the same everywhere, and within what the request asks for."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol_driver import mock_engine
from tokenizers import Tokenizer

from sfllm.messages import Sampling
from sfllm_worker.engine.interface import Progress, PromptReport
from sfllm_worker.engine.planner import Limits
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.mock.assets import CHAT_TEMPLATE, SPECIALS, TOKENIZER, TOKENIZER_CONFIG, assets
from sfllm_worker.mock.engine import MockEngine, Pace, Poison
from sfllm_worker.mock.tokens import (
    EOS_TOKEN,
    TEXT_TOKENS,
    VOCAB_SIZE,
    mock_logprobs,
    mock_text,
    mock_token,
    prompt_digest,
)

PROMPT = tuple(range(60, 80))


def sequence(
    prompt: tuple[int, ...] = PROMPT, output: tuple[int, ...] = (), choice: int = 0, **fields: object
) -> Sequence:
    sampling = Sampling(**{"max_tokens": 10, "seed": 7, **fields})  # type: ignore[arg-type]
    forks = tuple(range(1, 3)) if choice == -1 else ()
    return Sequence("r", max(0, choice), [*prompt, *output], len(prompt), sampling, forks)


def run(engine: MockEngine, *sequences: Sequence) -> tuple[list[Progress], list[PromptReport], float]:
    """All that the engine says, and how long it is to take."""
    for each in sequences:
        engine.add(each)
    progress, reports, seconds = [], [], 0.0
    while engine.has_work:
        result = engine.step()
        engine.check_integrity()
        progress += result.progress
        reports += result.prompt_reports
        seconds += result.seconds
    assert engine.free_kv_tokens == engine.kv_tokens
    return progress, reports, seconds


def tokens(progress: list[Progress], choice: int = 0) -> list[int]:
    return [p.token for p in progress if p.token is not None and p.sequence.choice == choice]


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 9),
    st.lists(st.integers(0, 258), min_size=1),
    st.integers(0, 40),
)
def test_a_text_that_is_continued_elsewhere_goes_on_as_it_would_have(
    seed: int, choice: int, prompt: list[int], start: int
) -> None:
    whole = mock_text(seed, choice, prompt, 50)
    assert mock_text(seed, choice, prompt, 50 - start, start) == whole[start:]
    assert len(whole) == 50
    assert whole.isprintable()


def test_every_choice_and_prompt_and_seed_has_a_text_of_its_own() -> None:
    texts = {
        mock_text(seed, choice, [prompt], 30)
        for seed in range(4)
        for choice in range(4)
        for prompt in range(4)
    }
    assert len(texts) == 64


def test_sequences_get_the_function_of_their_request_however_they_run() -> None:
    alone, _, _ = run(mock_engine(), sequence())
    assert "".join(map(chr, tokens(alone))) == mock_text(7, 0, PROMPT, 10)
    forked, _, _ = run(mock_engine(), sequence(choice=-1))
    resumed, _, _ = run(mock_engine(), sequence(output=tuple(tokens(forked, 2)[:4]), choice=2))
    assert tokens(forked, 0) == tokens(alone)
    assert tokens(forked, 2)[4:] == tokens(resumed, 2)
    crowd = [sequence(prompt=(n, *PROMPT), seed=n) for n in range(8)]
    together, _, _ = run(mock_engine(kv_tokens=120), *crowd)
    for each in crowd:
        of_it = [p.token for p in together if p.sequence is each]
        assert "".join(map(chr, of_it)) == mock_text(each.sampling.seed, 0, each.tokens[:21], 10)


def test_a_text_ends_at_its_length_unless_it_ignores_that() -> None:
    engine = MockEngine(Limits(4, 16, 4), 400, 100, output_tokens=6)
    ended, _, _ = run(engine, sequence())
    assert len(tokens(ended)) == 6
    assert (ended[-1].finish, ended[-1].token, ended[-1].stop_token_id) == ("stop", None, EOS_TOKEN)
    ignoring, _, _ = run(engine, sequence(ignore_eos=True))
    longer, _, _ = run(engine, sequence(min_tokens=8))
    assert [len(tokens(p)) for p in (ignoring, longer)] == [10, 8]
    assert [p[-1].finish for p in (ignoring, longer)] == ["length", "stop"]


def test_a_stop_token_ends_a_text_but_not_below_min_tokens() -> None:
    text = mock_text(7, 0, PROMPT, 10)
    stop = ord(text[3])
    at = text.index(chr(stop))
    ended, _, _ = run(mock_engine(), sequence(stop_token_ids=(stop,)))
    assert (len(tokens(ended)), ended[-1].finish, ended[-1].stop_token_id) == (at, "stop", stop)
    longer, _, _ = run(mock_engine(), sequence(stop_token_ids=(stop,), min_tokens=5))
    assert len(tokens(longer)) >= 5
    assert stop not in tokens(longer)[:5]


def test_only_allowed_tokens_come() -> None:
    progress, _, _ = run(mock_engine(), sequence(allowed_token_ids=(65, 66)))
    assert set(tokens(progress)) <= {65, 66}
    digest = prompt_digest(PROMPT)
    assert mock_token(1, 0, 0, digest, (65,), banned=(65,)) == 65, "when all are banned there is no other"
    assert mock_token(1, 0, 0, digest, TEXT_TOKENS, banned=TEXT_TOKENS[:-1]) == TEXT_TOKENS[-1]


def test_log_probabilities_come_as_asked_and_are_those_of_a_distribution() -> None:
    progress, reports, _ = run(mock_engine(), sequence(logprobs=3, prompt_logprobs=1))
    for each in progress:
        width, ids, values = each.logprobs
        assert (width, ids[0], ids[1], len(ids)) == (4, each.token, each.token, 4)
        assert values[0] == values[1] > values[2] > values[3]
    starts = [report.start for report in reports]
    counts = [len(report.logprobs.ids) // report.logprobs.width for report in reports]
    assert starts[0] == 1
    assert starts[-1] + counts[-1] == len(PROMPT)
    assert all(
        after == start + count for start, count, after in zip(starts, counts, starts[1:], strict=False)
    )
    everything = mock_logprobs(b"x", 5, 70, VOCAB_SIZE)
    assert len(set(everything.ids[1:])) == VOCAB_SIZE
    assert math.isclose(sum(map(math.exp, everything.values[1:])), 1, abs_tol=0.01)
    bare, reports, _ = run(mock_engine(), sequence())
    assert all(p.logprobs.width == 0 for p in bare)
    assert reports == []


def test_a_run_takes_as_long_as_its_rates_say() -> None:
    engine = MockEngine(Limits(4, 16, 4), 400, 100, Pace(tokens_per_second=10, prefill_tokens_per_second=100))
    _, _, seconds = run(engine, sequence())
    assert math.isclose(seconds, len(PROMPT) / 100 + 9 / 10)
    assert math.isclose(engine.longest_step_seconds(), 16 / 100)


def test_a_poisoned_prompt_strikes_when_it_is_computed_and_not_before() -> None:
    class StruckError(Exception):
        """The poison worked."""

    def strike() -> None:
        raise StruckError

    engine = MockEngine(Limits(1, 16, 4), 400, 100, poison=Poison(200, strike))
    engine.add(sequence(max_tokens=3))
    engine.add(sequence(prompt=(65, 200)))
    for _ in range(4):
        engine.step()
    assert engine.num_waiting == 1, "it waits for the first one to end"
    with pytest.raises(StruckError):
        engine.step()


def test_the_tokenizer_has_a_token_for_each_byte() -> None:
    files = assets()
    tokenizer = Tokenizer.from_str(files[TOKENIZER].decode())
    text = "naïve 日本 \n\t\x00{}"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert [tokenizer.token_to_id(special) for special in SPECIALS] == [256, 257, 258]
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert json.loads(files[TOKENIZER_CONFIG])["eos_token"] == SPECIALS[0]
    assert b"add_generation_prompt" in files[CHAT_TEMPLATE]
