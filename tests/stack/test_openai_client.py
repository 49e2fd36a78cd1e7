"""The official client against the real model through three real processes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import random
import socket
import urllib.parse
import urllib.request

import openai
import pytest
from running_stack import RunningStack

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_a_chat_answers_with_the_shape_that_the_client_validates(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=24)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_has_the_text_of_the_plain_one(client: openai.OpenAI, model: str) -> None:
    request = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    plain = client.chat.completions.create(**request)
    chunks = list(
        client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert deltas[0].delta.role == "assistant"
    assert "".join(d.delta.content or "" for d in deltas) == plain.choices[0].message.content
    assert [d.finish_reason for d in deltas if d.finish_reason] == [plain.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage


async def test_the_async_client_streams_many_answers_at_once(stack: RunningStack, model: str) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{stack.url}/v1", api_key="none", _strict_response_validation=True
    ) as client:

        async def ask(tokens: int) -> int:
            stream = await client.chat.completions.create(
                model=model,
                messages=QUESTION,
                max_tokens=tokens,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            last = [chunk async for chunk in stream][-1]
            return last.usage.completion_tokens if last.usage else 0

        assert await asyncio.gather(*(ask(tokens) for tokens in range(1, 9))) == list(range(1, 9))


def test_forty_requests_of_mixed_lengths_at_once_all_get_their_tokens(
    client: openai.OpenAI, model: str
) -> None:
    rng = random.Random(0)
    jobs = [
        ([rng.randrange(1000, 40000) for _ in range(rng.randrange(16, 512))], 4 + i % 13) for i in range(40)
    ]

    def complete(job: tuple[list[int], int]) -> tuple[int, int]:
        prompt, tokens = job
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0.8, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        return answer.usage.prompt_tokens, answer.usage.completion_tokens

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        assert list(pool.map(complete, jobs)) == [(len(prompt), tokens) for prompt, tokens in jobs]


def test_a_seed_gives_the_same_text_alone_and_among_others(client: openai.OpenAI, model: str) -> None:
    def write(seed: int) -> str:
        answer = client.completions.create(
            model=model, prompt="The weather today", max_tokens=16, temperature=1.0, top_p=0.95, seed=seed
        )
        return answer.choices[0].text

    alone = [write(seed) for seed in range(4)]
    assert len(set(alone)) == 4
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, range(4))) == alone


def test_several_choices_of_one_prompt_differ_and_are_counted_together(
    client: openai.OpenAI, model: str
) -> None:
    answer = client.completions.create(
        model=model,
        prompt="My favourite",
        max_tokens=8,
        n=3,
        temperature=1.2,
        seed=1,
        extra_body={"ignore_eos": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24


def test_a_stop_string_ends_the_text_before_it(
    client: openai.OpenAI, lenient_client: openai.OpenAI, model: str
) -> None:
    request = {"model": model, "prompt": "1, 2, 3, 4, 5,", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**request).choices[0].text
    assert " 8, 9" in whole
    stopped = client.completions.create(**request, stop=["8, 9"]).choices[0]
    assert stopped.text == whole[: whole.index("8, 9")]
    assert stopped.finish_reason == "stop"
    streamed = lenient_client.completions.create(**request, stop=["8, 9"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == stopped.text


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=model, messages=QUESTION, temperature=3)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt=[1] * 3000)
    assert caught.value.code == "context_length_exceeded"


def test_a_client_that_goes_away_gives_its_blocks_back(stack: RunningStack, model: str) -> None:
    url = urllib.parse.urlsplit(stack.url)
    body = f'{{"model":"{model}","prompt":"Once","max_tokens":1900,"ignore_eos":true,"stream":true}}'.encode()
    with socket.create_connection((url.hostname, url.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        received = b""
        while received.count(b"data: ") < 3:
            received += connection.recv(4096)
        worker = stack.worker_admins[0]
        assert stack.metric(worker, "sfllm:kv_blocks", state="used") > 0
    stack.wait_for_metric(worker, "sfllm:kv_blocks", 0, state="used")
    stack.wait_for_metric(worker, "sfllm:worker_sequences", 0, state="running")


def test_log_lines_of_all_three_processes_carry_the_request_id(stack: RunningStack, model: str) -> None:
    request = urllib.request.Request(
        f"{stack.url}/v1/completions",
        json.dumps({"model": model, "prompt": "Hi", "max_tokens": 2}).encode(),
        {"Content-Type": "application/json", "X-Request-Id": "follow-me-42"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["X-Request-Id"] == "follow-me-42"
    lines = [json.loads(line[line.index("{") :]) for line in stack.log_lines() if "follow-me-42" in line]
    assert {line["service"] for line in lines} == {"gateway", "scheduler", "worker"}
