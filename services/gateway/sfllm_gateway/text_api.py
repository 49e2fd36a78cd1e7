"""`/tokenize`, `/detokenize` and `/tokenizer_info`: what clients ask who count or score tokens themselves."""

from __future__ import annotations

from typing import Any

import msgspec

from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai.body import bad_value, decode_body
from sfllm_gateway.openai.chat import ChatMessage, check_messages, render
from sfllm_gateway.openai.reasoning import Effort
from sfllm_gateway.openai.sampling import check_token_ids
from sfllm_gateway.openai.tool_fields import Tool, ToolChoice
from sfllm_gateway.tokenize import TextPool, decode, encode

MADE_FROM_FILE = "PreTrainedTokenizerFast"
"""What transformers calls a tokenizer that is known by its tokenizer.json alone."""


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /tokenize`: `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    tools: list[Tool] | None = None
    tool_choice: str | ToolChoice | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /detokenize`."""

    tokens: list[int]
    model: str | None = None


_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


def decode_tokenize(body: bytes) -> TokenizeRequest:
    """The request. Raises 400 for what can be told without the model."""
    request = decode_body(body, _tokenize_decoder).request
    if (request.prompt is None) == (request.messages is None):
        raise bad_value("prompt", "give either prompt or messages")
    if request.messages is not None:
        check_messages(request.messages, request)
    return request


def decode_detokenize(body: bytes) -> DetokenizeRequest:
    """The request. Raises 400."""
    return decode_body(body, _detokenize_decoder).request


async def tokenize(request: TokenizeRequest, model: LoadedModel, pool: TextPool) -> dict[str, Any]:
    """The token ids of a text (with what the tokenizer puts around it, unless told not to) or of a chat."""
    adds = request.add_special_tokens
    if request.messages is not None:
        text, adds = await render(request.messages, request, model), bool(adds)
    else:
        text, adds = request.prompt or "", adds is not False
    tokenizer = model.text.tokenizer
    (ids,) = await pool.run(lambda: encode(tokenizer, [text], adds))
    names = [tokenizer.id_to_token(token) for token in ids] if request.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": model.card.max_model_len,
        "tokens": list(ids),
        "token_strs": names,
    }


async def detokenize(request: DetokenizeRequest, model: LoadedModel, pool: TextPool) -> dict[str, Any]:
    """The text of token ids, special tokens included."""
    check_token_ids(request.tokens, model.card, "tokens")
    (text,) = await pool.run(lambda: decode(model.text.tokenizer, [request.tokens], False))
    return {"prompt": text}


def tokenizer_info(model: LoadedModel) -> dict[str, Any]:
    """The model's tokenizer_config.json as far as it is known here, its chat template included."""
    text = model.text
    found: dict[str, Any] = {"tokenizer_class": MADE_FROM_FILE, "eos_token": None, **text.config}
    if found["eos_token"] is None and model.card.eos_token_ids:
        found["eos_token"] = text.tokenizer.id_to_token(model.card.eos_token_ids[0])
    found["chat_template"] = None if text.template is None else text.template.source
    found["model_max_length"] = model.card.max_model_len
    return found
