"""Sends the requests of a batch: so many at once, in the order of the file, again when it may help."""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections.abc import Callable, Iterable

import aiohttp
import msgspec

from sfllm_cli.batch_files import Answer, BatchRequest, Failure, with_model
from sfllm_cli.errors import CommandError

RETRIED_STATUSES = (429, 502, 503)
FIRST_WAIT_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
LONGEST_WAIT_SECONDS = 600.0
PROBE_SECONDS = 10.0

Outcome = Answer | Failure
Take = Callable[[BatchRequest, Outcome], None]


class _UnreachableError(Exception):
    """No answer came, and the request may never have arrived."""


def wait_seconds(retry: int, retry_after: float, chance: float) -> float:
    """How long to wait before the `retry`-th repetition, the first being 0.

    Doubles from `FIRST_WAIT_SECONDS` to `LONGEST_BACKOFF_SECONDS`, lowered by up to half by `chance` (0
    to 1) so that many do not come back at once; never less than the server asked for, within
    `LONGEST_WAIT_SECONDS`.
    """
    backoff = min(LONGEST_BACKOFF_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(retry, 32))
    spread = backoff * (1 - chance / 2)
    return min(LONGEST_WAIT_SECONDS, max(spread, retry_after))


def retry_after_seconds(header: str, now: float) -> float:
    """What a Retry-After header asks for, in seconds or as a date; 0 when it says nothing."""
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except (ValueError, OverflowError):
        return 0.0


class BatchSender:
    """Sends requests to one server. The session belongs to the caller."""

    def __init__(
        self, session: aiohttp.ClientSession, base_url: str, *, model: str | None, max_retries: int
    ) -> None:
        self._session = session
        self._base_url = base_url
        self._model = model
        self._max_retries = max_retries
        self.retries = 0

    async def send_all(self, requests: Iterable[BatchRequest], concurrency: int, take: Take) -> None:
        """Keep `concurrency` requests open until all have ended; `take` gets each with what became of it.

        Requests are begun in their order, for those that begin alike to find each other's prefix in
        the server's cache. Raises `CommandError` when the server is gone.
        """
        waiting = iter(requests)

        async def client() -> None:
            for request in waiting:
                take(request, await self.send(request))

        try:
            async with asyncio.TaskGroup() as clients:
                for _ in range(concurrency):
                    clients.create_task(client())
        except ExceptionGroup as group:
            raise group.exceptions[0] from group

    async def send(self, request: BatchRequest) -> Outcome:
        """What became of a request in the end. Raises `CommandError` when the server is gone."""
        for retry in range(self._max_retries + 1):
            retry_after = 0.0
            try:
                answer, header = await self._try(request)
                if answer.status_code not in RETRIED_STATUSES:
                    return answer
                retry_after = retry_after_seconds(header, time.time())
                outcome: Outcome = answer
            except _UnreachableError as error:
                outcome = Failure("connection_error", str(error))
            except TimeoutError:
                return Failure("timeout", "no answer within --timeout-seconds")
            except ValueError as error:
                return Failure("invalid_response", f"the answer is not JSON: {error}")
            if retry < self._max_retries:
                self.retries += 1
                await asyncio.sleep(wait_seconds(retry, retry_after, random.random()))
        if isinstance(outcome, Failure) and not await self._server_answers():
            # Not a failure of this request: were it noted as one, the whole rest would fail in its turn.
            raise CommandError(
                f"{self._base_url} cannot be reached any more ({outcome.message}). "
                "Run the same command again to go on"
            )
        return outcome

    async def _try(self, request: BatchRequest) -> tuple[Answer, str]:
        """The answer to one attempt, and its Retry-After. Raises what `send` handles."""
        body = bytes(request.body) if self._model is None else with_model(request.body, self._model)
        url = self._base_url + request.url
        try:
            async with self._session.post(
                url, data=body, headers={"Content-Type": "application/json"}
            ) as response:
                data = await response.read()
        except (aiohttp.ClientError, ConnectionError) as error:
            raise _UnreachableError(str(error) or type(error).__name__) from error
        request_id = response.headers.get("x-request-id", "")
        return (
            Answer(response.status, request_id, _json(data, response.status)),
            response.headers.get("Retry-After", ""),
        )

    async def _server_answers(self) -> bool:
        """Whether the server answers anything at all."""
        try:
            timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
            async with self._session.get(f"{self._base_url}/v1/models", timeout=timeout):
                return True
        except (aiohttp.ClientError, OSError):
            return False


def _json(data: bytes, status: int) -> msgspec.Raw:
    """An answer on one line, its values as they were written; the text of an error that is no JSON."""
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        if status == 200:
            raise
        text = data.decode("utf-8", "replace")[:2000]
        return msgspec.Raw(msgspec.json.encode({"error": {"message": text}}))
    return msgspec.Raw(msgspec.json.format(data, indent=-1))
