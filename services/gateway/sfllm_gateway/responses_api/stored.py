"""The paths of responses that OpenAI's servers keep. This server keeps none, and says so."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import Response

from sfllm.errors import ErrorCode, ServiceError
from sfllm_gateway import openapi
from sfllm_gateway.responses_api.fields import KEEPS_NOTHING

RESPONSE = "/v1/responses/{response_id}"

ROUTES = (
    (RESPONSE, ["GET", "DELETE"], "response", "A response that was given before"),
    (f"{RESPONSE}/cancel", ["POST"], "cancel_response", "Cancel a response made in the background"),
    (f"{RESPONSE}/input_items", ["GET"], "response_input_items", "The input of a response"),
)


def add_routes(app: FastAPI) -> None:
    """Let the paths answer 501 with the reason, whatever the response."""
    for path, methods, name, summary in ROUTES:
        app.add_api_route(
            path,
            _refuse,
            methods=methods,
            name=name,
            summary=f"{summary}: not supported, {KEEPS_NOTHING}",
            status_code=501,
            responses=openapi.error_responses(501),
        )


async def _refuse(response_id: str) -> Response:  # noqa: ARG001 - the path has it
    raise ServiceError(
        ErrorCode.NOT_SUPPORTED, f"{KEEPS_NOTHING}: send the items of the conversation with each request"
    )
