"""`POST /v1/messages` and `/v1/messages/count_tokens`, served as the chats that they stand for."""

from __future__ import annotations

import msgspec

from sfllm.errors import ServiceError
from sfllm_gateway.anthropic import fields
from sfllm_gateway.anthropic.answer import MessagesAnswer
from sfllm_gateway.anthropic.fields import Thinking
from sfllm_gateway.anthropic.translate import chat_request, renamed
from sfllm_gateway.generation import Generation
from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai import chat
from sfllm_gateway.openai.body import Body
from sfllm_gateway.tokenize import TextPool, encode


class Messages(msgspec.Struct):
    """A request as the chat that it stands for, and what only its answer needs."""

    chat: chat.ChatRequest
    request_id: str | None
    thinking: Thinking | None

    @property
    def model(self) -> str | None:
        """The model that was asked for."""
        return self.chat.model


def decode(body: bytes) -> Body[Messages]:
    """The request. Raises 400 naming the field at fault, 501 for what is not served."""
    request, ignored = fields.decode_messages(body)
    return Body(Messages(chat_request(request), request.request_id, request.thinking), ignored)


def check(messages: Messages) -> None:
    """Raise 400 or 501 for what else can be told without the model."""
    _check(messages.chat)


async def prepare(messages: Messages, model: LoadedModel, pool: TextPool) -> Generation:
    """Render, tokenize and resolve defaults. Raises 400 for what does not fit the model."""
    try:
        return await chat.prepare(messages.chat, model, pool)
    except ServiceError as error:
        raise renamed(error) from error


def answer(messages: Messages, generation: Generation, name: str, _arrived: float) -> MessagesAnswer:
    """What writes the answer."""
    thinking = messages.thinking
    return MessagesAnswer(name, generation, thinking is not None and thinking.display == "omitted")


def decode_count(body: bytes) -> chat.ChatRequest:
    """The conversation to count. Raises 400 or 501 naming the field at fault."""
    request = chat_request(fields.decode_count(body))
    _check(request)
    return request


def _check(request: chat.ChatRequest) -> None:
    try:
        chat.check(request)
    except ServiceError as error:
        raise renamed(error) from error


async def count_tokens(request: chat.ChatRequest, model: LoadedModel, pool: TextPool) -> dict[str, int]:
    """How many tokens the prompt of a conversation has. Raises 400 for what does not fit the model."""
    text = await chat.render(request.messages, request, model)
    (ids,) = await pool.run(lambda: encode(model.text.tokenizer, [text], False))
    return {"input_tokens": len(ids)}
