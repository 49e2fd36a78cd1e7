"""Sends one request and notes exactly what came back."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import msgspec

from chaos.http_client import Address, Answer, BrokenConnectionError, Connection
from chaos.templates import Template

Ended = Literal["complete", "left", "broken", "turned away", "error"]

PAUSE_BEFORE_RETRY_SECONDS = 0.2
LONGEST_SECONDS = 270.0
"""An answer that takes longer is given up, and counts as lost."""

TURNED_AWAY = frozenset({429, 503})
"""Statuses before any token by which a server says that it took nothing on."""


@dataclasses.dataclass
class Delivered:
    """What came of one choice."""

    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None


@dataclasses.dataclass
class Delivery:
    """What came of one request.

    `ended`: with its regular end; because the client "left"; because the connection "broke"; "turned away"
    before anything was accepted; or with an "error". `longest_pause` is between events, in seconds.
    """

    template: Template
    choices: dict[int, Delivered] = dataclasses.field(default_factory=dict)
    prompt_ids: list[int] = dataclasses.field(default_factory=list)
    usage_tokens: int | None = None
    ended: Ended = "broken"
    status: int = 0
    error: str = ""
    request_id: str = ""
    began: float = 0.0
    longest_pause: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of all choices."""
        return sum(len(choice.ids) for choice in self.choices.values())


def _ignore(_tokens: int) -> None:
    """Nobody wants to know."""


class Reading(NamedTuple):
    """How a client reads a stream: with a pause after each event, with a small buffer (0: the usual one).

    `on_tokens` hears after each event how many tokens there are now.
    """

    pause_seconds: float = 0.0
    receive_buffer_bytes: int = 0
    on_tokens: Callable[[int], None] = _ignore


async def ask(
    address: Address,
    template: Template,
    leave_after: float | None = None,
    reading: Reading = Reading(),  # noqa: B008 - immutable
) -> Delivery:
    """Send the request, leave after so many seconds if it lasts that long, and note what came."""
    delivery = Delivery(template, began=time.monotonic())
    connection: Connection | None = None
    try:
        async with asyncio.timeout(LONGEST_SECONDS if leave_after is None else leave_after):
            connection = await Connection.open(address, reading.receive_buffer_bytes)
            answer = await connection.request("POST", template.path, template.body)
            delivery.status = answer.status
            delivery.request_id = answer.headers.get("x-request-id", "")
            await _take(answer, delivery, reading)
    except TimeoutError:
        delivery.ended = "broken" if leave_after is None else "left"
        delivery.error = f"no end after {LONGEST_SECONDS:.0f} s"
    except (BrokenConnectionError, OSError) as error:
        delivery.ended = "broken" if connection is not None else "turned away"
        delivery.error = str(error)
    finally:
        if connection is not None:
            connection.abort()
    return delivery


async def ask_until_accepted(address: Address, template: Template, seconds: float = 30.0) -> Delivery:
    """Ask again while nothing was accepted, for at most so many seconds; the last delivery."""
    end = time.monotonic() + seconds
    while True:
        delivery = await ask(address, template)
        if delivery.ended != "turned away" or time.monotonic() > end:
            return delivery
        await asyncio.sleep(PAUSE_BEFORE_RETRY_SECONDS)


async def _take(answer: Answer, delivery: Delivery, reading: Reading) -> None:
    if answer.status != 200:
        delivery.error = (await answer.body()).decode(errors="replace")
        delivery.ended = "turned away" if answer.status in TURNED_AWAY else "error"
    elif delivery.template.streams:
        await _take_events(answer, delivery, reading)
    else:
        _note(delivery, msgspec.json.decode(await answer.body()))
        delivery.ended = "complete"


async def _take_events(answer: Answer, delivery: Delivery, reading: Reading) -> None:
    last = delivery.began
    async for event in answer.events():
        now = time.monotonic()
        delivery.longest_pause, last = max(delivery.longest_pause, now - last), now
        if event == b"[DONE]":
            delivery.ended = "error" if delivery.error else "complete"
            return
        _note(delivery, msgspec.json.decode(event))
        reading.on_tokens(delivery.tokens)
        if reading.pause_seconds:
            await asyncio.sleep(reading.pause_seconds)


def _note(delivery: Delivery, content: dict[str, Any]) -> None:
    """Take in an event, or a whole answer: they have the same parts."""
    if "error" in content:
        delivery.error = f"{content['error']['code']}: {content['error']['message']}"
        return
    if content.get("usage"):
        delivery.usage_tokens = content["usage"]["completion_tokens"]
    delivery.prompt_ids = content.get("prompt_token_ids") or delivery.prompt_ids
    for choice in content["choices"]:
        delivery.prompt_ids = choice.get("prompt_token_ids") or delivery.prompt_ids
        found = delivery.choices.setdefault(choice["index"], Delivered())
        part = choice.get("delta") or choice.get("message") or choice
        found.text += part.get("text") or part.get("content") or ""
        found.ids += choice.get("token_ids") or ()
        found.finish_reason = choice["finish_reason"] or found.finish_reason
        logprobs = choice.get("logprobs") or {}
        found.logprobs += logprobs.get("token_logprobs") or ()
        found.logprobs += [entry["logprob"] for entry in logprobs.get("content") or ()]
