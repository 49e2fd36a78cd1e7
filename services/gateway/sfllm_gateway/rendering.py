"""Chat templates run in processes of their own, which can be killed.

A template is a program that came with a model, and its arguments come with requests: it may
take for ever or fill the memory.
"""

from __future__ import annotations

from typing import Any

import msgspec
import structlog

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.dialect import knows_tools
from sfllm_gateway.helpers import HelperBusyError, HelperPool
from sfllm_gateway.prompt import RenderJob, RenderResult

PROCESSES = 2
RENDER_SECONDS = 5.0

log = structlog.get_logger()

_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(RenderResult)


class RenderPool:
    """Renders chat templates. Owns its processes until `close`."""

    def __init__(self) -> None:
        self._helpers = HelperPool(
            "sfllm_gateway.render_process", first_job=_encode(RenderJob("", {})), count=PROCESSES
        )

    async def render(self, job: RenderJob) -> RenderResult:
        """What came of a job. Raises `ServiceError` (400) if it cannot be done in bounded time and memory."""
        try:
            encoded = _encode(job)
        except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
            raise _refused(f"they cannot be passed on ({error})") from error
        try:
            async with self._helpers.take() as helper:
                return _decoder.decode(await helper.run(encoded, RENDER_SECONDS))
        except HelperBusyError as error:
            raise ServiceError(
                ErrorCode.SERVICE_UNAVAILABLE, "too many chats wait for their template", retry_after_seconds=1
            ) from error
        except TimeoutError as error:
            log.warning("chat template takes too long, its process was killed")
            raise _refused(f"rendering takes longer than {RENDER_SECONDS:g} s") from error
        except OSError as error:
            log.warning("chat template not rendered", reason=str(error))
            raise _refused("rendering them needs too much") from error

    async def close(self) -> None:
        """Kill the processes."""
        await self._helpers.close()


class ChatTemplate:
    """One model's template. `special_tokens` are names such as `bos_token` with their text."""

    def __init__(self, pool: RenderPool, source: str, special_tokens: dict[str, str]) -> None:
        self.source = source
        self.knows_tools = knows_tools(source)
        self._pool = pool
        self._special_tokens = special_tokens

    async def problem(self) -> str | None:
        """Why the template does not compile, None if it does."""
        return (await self._pool.render(RenderJob(self.source, self._special_tokens))).syntax_error

    async def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The prompt; `options` are further fields of `RenderJob`. Raises `ServiceError` (400) if refused."""
        result = await self._pool.render(RenderJob(self.source, self._special_tokens, messages, **options))
        if result.text is None:
            raise ServiceError(ErrorCode.INVALID_REQUEST, result.error, param=result.param)
        return result.text


def _refused(reason: str) -> ServiceError:
    return ServiceError(
        ErrorCode.INVALID_REQUEST,
        f"the model's chat template cannot render these messages: {reason}",
        param="messages",
    )
