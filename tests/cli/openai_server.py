"""A small OpenAI-compatible server for the client commands: fixed answers over real HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class OpenAIServer:
    """What the server does and what it saw."""

    url: str = ""
    model: str = "tiny"
    text_only: bool = False
    fail_every: int = 0
    cut_streams: bool = False
    sends_usage: bool = True
    answers_together: int = 0
    answer: tuple[str, ...] = ("Hello", " there", "!")
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    open_now: int = 0
    most_open: int = 0
    _enough_are_open: asyncio.Event = field(default_factory=asyncio.Event)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        if self.text_only and not isinstance(body["prompt"], str):
            return _error(400, "prompt must be a string")
        if self.fail_every and len(self.requests) % self.fail_every == 0:
            return _error(429, "the queue is full")
        prompt = body["prompt"]
        tokens = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        count = body["max_tokens"]
        events = [{"choices": [{"index": 0, "text": " x", "finish_reason": None}]} for _ in range(count)]
        return await self._stream(request, events, tokens, count)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        words = sum(len(message["content"].split()) for message in body["messages"])
        deltas = [{"role": "assistant", "content": ""}, *({"content": text} for text in self.answer)]
        events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        return await self._stream(request, events, words, len(self.answer))

    async def _stream(
        self, request: web.Request, events: list[dict[str, Any]], prompt_tokens: int, output_tokens: int
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        if self.open_now >= self.answers_together:
            self._enough_are_open.set()
        if output_tokens > 1:  # one token is what a client asks for to try the server
            await asyncio.wait_for(self._enough_are_open.wait(), 30)
        for event in events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(0)
        self.open_now -= 1
        if self.cut_streams:
            return response
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens}
        await response.write(b": keep-alive\n\n")
        if self.sends_usage:
            await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "invalid_request_error"}}, status=status)


@contextmanager
def running(server: OpenAIServer) -> Iterator[OpenAIServer]:
    """`server` in a thread of its own, at a free port of loopback."""
    application = web.Application()
    application.router.add_get("/v1/models", server.models)
    application.router.add_post("/v1/completions", server.completions)
    application.router.add_post("/v1/chat/completions", server.chat)
    started, stop, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        runner = web.AppRunner(application)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            server.url = "http://{}:{}".format(*runner.addresses[0][:2])
            started.set()
            await stop.wait()
        finally:
            await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert started.wait(10)
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
