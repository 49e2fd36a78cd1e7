"""Who asks, for fairness and limits: named by the API key, which itself goes no further than this process."""

from __future__ import annotations

from hashlib import sha256

from starlette.types import Scope

from sfllm_gateway.http_io import header

NAME_DIGITS = 16
_SCHEME = "bearer "


def tenant_of(scope: Scope) -> str:
    """The first hex digits of the SHA-256 of the key that the request presents, empty without a key."""
    key = presented_key(scope)
    return sha256(key.encode("latin-1")).hexdigest()[:NAME_DIGITS] if key else ""


def presented_key(scope: Scope) -> str:
    """The key of `Authorization: Bearer KEY` or else of `x-api-key: KEY`, empty without either."""
    authorization = header(scope, b"authorization") or ""
    if authorization[: len(_SCHEME)].lower() == _SCHEME:
        return authorization[len(_SCHEME) :].strip()
    return (header(scope, b"x-api-key") or "").strip()
