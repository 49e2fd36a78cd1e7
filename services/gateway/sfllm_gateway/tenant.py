"""Who asks, for fairness and limits: named by the API key, which itself goes no further than this process."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway.error_answers import send_error
from sfllm_gateway.http_io import header
from sfllm_gateway.keys import ApiKeys, tenant_of

OPEN_PATHS = frozenset(
    {"/health", "/ready", "/ping", "/metrics", "/version", "/openapi.json", "/docs", "/docs/oauth2-redirect"}
)
"""Probes, monitoring and documentation need no key. Everything else does, whatever is added."""

_SCHEME = "bearer "


class KeyCheck:
    """Names the tenant of each request, and answers 401 to those without a key where one is needed."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or refuse one request."""
        key = presented_key(scope)
        if not self._keys.needed or scope["path"] in OPEN_PATHS:
            tenant: str | None = tenant_of(key)
        else:
            tenant = self._keys.name(key, time.monotonic()) if key else None
        if tenant is None:
            await send_error(scope, send, _refusal(key))
            return
        scope["state"]["tenant"] = tenant
        await self._app(scope, receive, send)


def presented_key(scope: Scope) -> bytes:
    """The key of `Authorization: Bearer KEY` or else of `x-api-key: KEY`, empty without either."""
    authorization = header(scope, b"authorization") or ""
    if authorization[: len(_SCHEME)].lower() == _SCHEME:
        return authorization[len(_SCHEME) :].strip().encode("latin-1")
    return (header(scope, b"x-api-key") or "").strip().encode("latin-1")


def _refusal(key: bytes) -> ServiceError:
    return ServiceError(
        ErrorCode.INVALID_API_KEY,
        "this API key is not known here"
        if key
        else "an API key is needed, as Authorization: Bearer KEY or x-api-key: KEY",
    )
