"""The official client, strict about every field, against a real gateway process."""

from __future__ import annotations

import openai
import pytest
from fake_scheduler import FakeScheduler
from gateway_process import GatewayProcess
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from sfllm.messages import Rejected

MESSAGES: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "say:schön €"}]


def make_client(gateway: GatewayProcess, strict: bool = True) -> OpenAI:
    return OpenAI(
        base_url=f"{gateway.url}/v1",
        api_key="none",
        _strict_response_validation=strict,
        max_retries=0,
        timeout=20,
    )


@pytest.fixture
def client(gateway: GatewayProcess) -> OpenAI:
    return make_client(gateway)


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, n=2)
    assert [choice.message.content for choice in answer.choices] == ["schön €", "schön €"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_chat_streaming(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "schön €"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None


def test_chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.refusal is None
    assert bytes(byte for token in logprobs.content for byte in token.bytes or ()).decode() == "schön €"
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in logprobs.content)


def test_chat_logprobs_streaming(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, stream=True
        )
    )
    found = [chunk.choices[0].logprobs for chunk in chunks]
    tokens = [token for logprobs in found if logprobs is not None for token in logprobs.content or ()]
    assert bytes(byte for token in tokens for byte in token.bytes or ()).decode() == "schön €"
    assert [len(token.top_logprobs) for token in tokens] == [2] * len(tokens)


def test_the_clients_stream_helper_puts_logprobs_together(client: OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, logprobs=True) as stream:
        logprobs = stream.get_final_completion().choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.token for token in logprobs.content[:3]] == ["s", "c", "h"]


def test_the_clients_own_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "schön €"


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=["say:a", "say:b"])
    assert [choice.text for choice in answer.choices] == ["a", "b"]


def test_completions_streaming(gateway: GatewayProcess) -> None:
    # Not strict: the client's type does not allow the null finish_reason that OpenAI itself streams here.
    client = make_client(gateway, strict=False)
    chunks = list(client.completions.create(model="tiny", prompt="x", stream=True, max_tokens=4))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abcd"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_completion_logprobs(client: OpenAI) -> None:
    logprobs = client.completions.create(model="tiny", prompt="say:ab", logprobs=2).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b"]
    assert logprobs.text_offset == [0, 1]
    assert logprobs.token_logprobs == [-0.25, -0.25]
    assert logprobs.top_logprobs == [{"a": -0.25, "b": -1.5}, {"b": -0.25, "c": -1.5}]


def test_completion_logprobs_of_an_echo(gateway: GatewayProcess) -> None:
    # Not strict: the client's type does not allow the null that OpenAI itself gives for the first token.
    client = make_client(gateway, strict=False)
    answer = client.completions.create(model="tiny", prompt="say:ab", logprobs=1, echo=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == list("say:abab")
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None


def test_completion_logprobs_streaming(gateway: GatewayProcess) -> None:
    client = make_client(gateway, strict=False)  # as in `test_completions_streaming`
    chunks = list(client.completions.create(model="tiny", prompt="say:ab", logprobs=1, stream=True))
    found = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for logprobs in found if logprobs for token in logprobs.tokens or ()] == ["a", "b"]


def test_cached_tokens_and_sampling_fields_pass_through(client: OpenAI, scheduler: FakeScheduler) -> None:
    scheduler.script.cached_tokens = 7
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={"5": -100},
        seed=1,
        extra_body={"repetition_penalty": 1.1, "bad_words": ["x"], "cache_salt": "s"},
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 7


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-alias"]
    assert client.models.retrieve("tiny").owned_by == "sfllm"


async def test_the_async_client(gateway: GatewayProcess) -> None:
    async with AsyncOpenAI(
        base_url=f"{gateway.url}/v1",
        api_key="none",
        _strict_response_validation=True,
        max_retries=0,
        timeout=20,
    ) as client:
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert answer.choices[0].message.content == "schön €"
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == "schön €"


def test_errors_become_the_clients_exceptions(client: OpenAI, scheduler: FakeScheduler) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=MESSAGES)
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    assert bad.value.code == "invalid_request"
    scheduler.script.reject = Rejected(0, 0, "queue_full", "full", 3.0)
    with pytest.raises(openai.RateLimitError) as full:
        client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    assert full.value.response.headers["retry-after"] == "3"


def test_an_error_in_the_middle_of_a_stream_is_raised(client: OpenAI, scheduler: FakeScheduler) -> None:
    scheduler.script.pause_at = 1
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    assert next(stream).choices[0].delta.role == "assistant"
    assert next(stream).choices[0].delta.content == "s"
    scheduler.script.suspects = 1
    scheduler.script.interrupt_at = [2, 3, 4, 5]
    scheduler.resume()
    with pytest.raises(openai.APIError, match="workers failed"):
        list(stream)
