"""What the engine promises, asked for over HTTP with the real model."""

from __future__ import annotations

import math
import threading

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

STORY = "Once upon a time there was a small engine that computed every prompt only once. " * 6
CONTINUOUS_USAGE = {"include_usage": True, "continuous_usage_stats": True}


def test_cached_tokens_of_a_repeated_prompt_are_counted_in_usage(client: openai.OpenAI, model: str) -> None:
    def ask(**fields: object) -> int:
        answer = client.completions.create(
            model=model, prompt=STORY + "It", max_tokens=2, temperature=0, extra_body=fields
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    ask()
    assert ask() >= 64
    assert ask(cache_salt="another tenant") == 0
    assert ask(cache_salt="another tenant") >= 64


def test_a_cached_prefix_does_not_change_the_answer(client: openai.OpenAI, model: str) -> None:
    def ask(salt: str) -> str:
        answer = client.completions.create(
            model=model, prompt=STORY + "They", max_tokens=24, temperature=0, extra_body={"cache_salt": salt}
        )
        return answer.choices[0].text

    assert ask("one") == ask("one") == ask("two")


def test_log_probabilities_of_a_chat_are_consistent(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=12,
        logprobs=True,
        top_logprobs=4,
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert "".join(entry.token for entry in content) == choice.message.content
    for entry in content:
        best = entry.top_logprobs[0]
        assert (best.token, best.logprob) == (entry.token, pytest.approx(entry.logprob)), (
            "greedy takes the best"
        )
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0 + 1e-5
        assert entry.bytes == list(entry.token.encode())


def test_echo_scores_a_text_as_it_was_generated(
    client: openai.OpenAI, lenient_client: openai.OpenAI, model: str
) -> None:
    prompt = "The capital of France is"
    generated = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=8,
        temperature=0,
        logprobs=1,
        extra_body={"return_token_ids": True},
    ).choices[0]
    assert generated.logprobs is not None
    scored = lenient_client.completions.create(
        model=model, prompt=prompt + generated.text, max_tokens=0, echo=True, logprobs=1, temperature=0
    ).choices[0]
    assert scored.text == prompt + generated.text
    assert scored.logprobs is not None
    values = scored.logprobs.token_logprobs or []
    assert values[0] is None
    expected = generated.logprobs.token_logprobs or []
    assert values[-len(expected) :] == pytest.approx(expected, abs=1e-3)


def test_a_strong_bias_and_a_ban_decide_what_is_said(client: openai.OpenAI, model: str) -> None:
    request = {"model": model, "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
    plain = client.completions.create(**request).choices[0].text
    assert plain.strip() == "Paris"
    banned = client.completions.create(**request, extra_body={"bad_words": ["Paris"]}).choices[0].text
    assert banned.strip() != "Paris"
    ids = client.completions.create(**request, extra_body={"return_token_ids": True}).choices[0]
    token = (ids.model_extra or {})["token_ids"][0]
    biased = client.completions.create(**request, logit_bias={str(token): -100}).choices[0].text
    assert biased.strip() != "Paris"


def test_a_repetition_is_broken_by_penalties(client: openai.OpenAI, model: str) -> None:
    request = {"model": model, "prompt": "na na na na na na na na", "max_tokens": 16, "temperature": 0}
    plain = client.completions.create(**request).choices[0].text
    assert plain.count("na") >= 10
    penalised = client.completions.create(**request, frequency_penalty=2, presence_penalty=2).choices[0].text
    assert penalised.count("na") < plain.count("na")


def test_tokens_of_others_keep_coming_while_a_long_prompt_is_prefilled(
    client: openai.OpenAI, model: str
) -> None:
    long_prompt = list(range(1000, 2900))
    visible = client.completions.create(
        model=model, prompt=" one", max_tokens=1, extra_body={"return_token_ids": True}
    ).choices[0]
    [token] = (visible.model_extra or {})["prompt_token_ids"]
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Count."}],
        max_tokens=1000,
        stream=True,
        # Only tokens with text make events; which ones the model would choose depends on the machine.
        extra_body={"allowed_token_ids": [token], "stream_options": CONTINUOUS_USAGE},
    )

    def tokens_so_far(chunk: ChatCompletionChunk) -> int:
        assert chunk.usage is not None
        return chunk.usage.completion_tokens

    next(stream)  # the role, which may come with the first token or before it
    before = now = tokens_so_far(next(stream))
    finished = threading.Event()

    def prefill() -> None:
        client.completions.create(model=model, prompt=long_prompt, max_tokens=1)
        finished.set()

    thread = threading.Thread(target=prefill)
    thread.start()
    for chunk in stream:
        if finished.is_set():
            break
        now = tokens_so_far(chunk)
    stream.close()
    thread.join()
    # 1,900 tokens are four chunks of 512: a step for each, and a token of the stream in each.
    assert now - before >= 3
