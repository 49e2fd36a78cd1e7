"""One question to one process over HTTP, and what can be told of how it went."""

from __future__ import annotations

import email.utils
import json
import time
from typing import Any, Literal, NamedTuple

import aiohttp

from sfllm_cli.client import error_message

Failure = Literal["", "refused", "timeout", "unreachable", "protocol"]

MAX_BODY_BYTES = 8 * 2**20


class ClockOffset(NamedTuple):
    """Between what its clock is ahead of ours, in seconds: answers name whole seconds."""

    least: float
    most: float


class Answer(NamedTuple):
    """What came back. `status` is 0 when nothing did, and then `failure` and `detail` say why."""

    status: int = 0
    body: str = ""
    failure: Failure = ""
    detail: str = ""
    clock: ClockOffset | None = None

    @property
    def ok(self) -> bool:
        """Whether it is what was asked for."""
        return self.status == 200

    def fields(self) -> dict[str, Any]:
        """The body as a JSON object; empty if it is none."""
        try:
            value = json.loads(self.body)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def reason(self) -> str:
        """Why it is not what was asked for, in the process's own words."""
        if not self.status:
            return self.detail
        reason = self.fields().get("reason")
        return str(reason)[:300] if reason else error_message(self.body)


async def ask(session: aiohttp.ClientSession, url: str, key: str | None = None) -> Answer:
    """GET `url`; whatever goes wrong is in the answer. Certificates are a check of their own, not of this."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    started = time.time()
    try:
        async with session.get(url, headers=headers, ssl=False, allow_redirects=False) as response:
            arrived = time.time()
            body = await response.content.read(MAX_BODY_BYTES)
            while not response.content.at_eof() and len(body) < MAX_BODY_BYTES:
                body += await response.content.read(MAX_BODY_BYTES - len(body))
            clock = _clock(response.headers.get("Date"), started, arrived)
            return Answer(response.status, body.decode(errors="replace"), clock=clock)
    except TimeoutError as error:
        return Answer(failure="timeout", detail=str(error) or "no answer in time")
    except aiohttp.ClientConnectorSSLError as error:
        return Answer(failure="protocol", detail=str(error))
    except aiohttp.ClientConnectorError as error:
        refused = isinstance(error.os_error, ConnectionRefusedError)
        return Answer(failure="refused" if refused else "unreachable", detail=str(error))
    except aiohttp.ClientError as error:
        return Answer(failure="protocol", detail=str(error) or type(error).__name__)


def _clock(date: str | None, started: float, arrived: float) -> ClockOffset | None:
    """What the header `Date` of an answer between these two of our times tells of the other clock."""
    if date is None:
        return None
    try:
        told = email.utils.parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None
    return ClockOffset(told - arrived, told + 1 - started)
