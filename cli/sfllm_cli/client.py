"""What `bench` and `chat` need of an OpenAI-compatible server over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from sfllm_cli.errors import CommandError
from sfllm_cli.settings import ClientSettings

MAX_EVENT_BYTES = 2**20
CONNECT_SECONDS = 10.0


class ServerError(Exception):
    """The server answered with an error, or broke its protocol; the text is for people."""


def open_session(settings: ClientSettings, timeout_seconds: float, connections: int) -> aiohttp.ClientSession:
    """A session for that server; the caller closes it."""
    headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections),
        timeout=aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=CONNECT_SECONDS),
        headers=headers,
        read_bufsize=MAX_EVENT_BYTES,
    )


async def choose_model(session: aiohttp.ClientSession, settings: ClientSettings) -> str:
    """The model to use: the one asked for, or the first listed. Raises `CommandError` with what to do."""
    url = f"{settings.base_url}/v1/models"
    try:
        async with session.get(url) as response:
            if response.status != 200:
                raise CommandError(
                    f"{url} answered {response.status}: {error_message(await response.text())}"
                )
            names = [str(model["id"]) for model in (await response.json(content_type=None))["data"]]
    except (aiohttp.ClientError, TimeoutError) as error:
        raise CommandError(
            f"no server answers at {settings.base_url} ({str(error) or type(error).__name__}). "
            "Start one with `sfllm serve`, or name it with --url"
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise CommandError(f"{url} is not an OpenAI-compatible list of models: {error!r}") from error
    if settings.model is not None:
        # Not checked against the list: a server may accept aliases that it does not show.
        return settings.model
    if not names:
        raise CommandError(
            f"the server at {settings.base_url} has no model ready yet: see {settings.base_url}/ready"
        )
    return names[0]


async def stream_events(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed answer, until `[DONE]`. Raises `ServerError` or aiohttp's errors."""
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise ServerError(f"HTTP {response.status}: {error_message(await response.text())}")
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield _event(data)
    raise ServerError("the stream ended without [DONE]")


def _event(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise ServerError(f"an event is not JSON: {data[:100]!r}") from error
    if not isinstance(event, dict):
        raise ServerError(f"an event is not an object: {data[:100]!r}")
    if "error" in event:
        raise ServerError(error_message(data.decode()))
    return event


def error_message(body: str) -> str:
    """The sentence in an error body, or the start of whatever came."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    except (ValueError, LookupError, TypeError):
        return body[:200].strip() or "(empty)"
