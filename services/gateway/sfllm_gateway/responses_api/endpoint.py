"""`POST /v1/responses`, served as the chat that it stands for."""

from __future__ import annotations

import msgspec

from sfllm.errors import ServiceError
from sfllm_gateway.generation import Generation
from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai import chat
from sfllm_gateway.openai.body import Body
from sfllm_gateway.responses_api import fields
from sfllm_gateway.responses_api.answer import ResponsesAnswer
from sfllm_gateway.responses_api.fields import Decoded
from sfllm_gateway.responses_api.translate import Translation, translate
from sfllm_gateway.tokenize import TextPool


class Responses(msgspec.Struct):
    """A request, and the chat that it stands for."""

    decoded: Decoded
    translation: Translation

    @property
    def model(self) -> str | None:
        """The model that was asked for."""
        return self.decoded.request.model

    @property
    def request_id(self) -> str | None:
        """How the client calls the request."""
        return self.decoded.request.request_id


def decode(body: bytes) -> Body[Responses]:
    """The request. Raises 400 naming the field at fault, 501 for what is not served."""
    decoded = fields.decode(body)
    return Body(Responses(decoded, translate(decoded.request)), decoded.ignored)


def check(responses: Responses) -> None:
    """Raise 400 or 501 for what else can be told without the model."""
    try:
        chat.check(responses.translation.chat)
    except ServiceError as error:
        raise responses.translation.renamed(error) from error


async def prepare(responses: Responses, model: LoadedModel, pool: TextPool) -> Generation:
    """Render, tokenize and resolve defaults. Raises 400 for what does not fit the model."""
    try:
        return await chat.prepare(responses.translation.chat, model, pool)
    except ServiceError as error:
        raise responses.translation.renamed(error) from error


def answer(responses: Responses, generation: Generation, name: str, _arrived: float) -> ResponsesAnswer:
    """What writes the answer."""
    return ResponsesAnswer(name, responses.decoded, generation)
