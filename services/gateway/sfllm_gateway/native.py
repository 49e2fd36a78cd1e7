"""`POST /generate`: the API of text or token ids with `sampling_params`, answered as SGLang does."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sfllm.errors import ServiceError
from sfllm.messages import ModelCard
from sfllm.wire import DECODE_ERRORS
from sfllm_gateway.generation import Generation, Prompts, Update, Usage
from sfllm_gateway.http_io import DONE, failed_stream
from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai.body import Body, bad_value, decode_fields, invalid
from sfllm_gateway.openai.fields import SamplingFields
from sfllm_gateway.openai.sampling import (
    BadWords,
    TokenLimits,
    check_bad_words,
    check_token_ids,
    encode_bad_words,
    make_sampling,
    stop_strings,
)
from sfllm_gateway.openai.structured import Form, grammar_of, native_form
from sfllm_gateway.openai.unbuilt import UNBUILT, refuse_unbuilt
from sfllm_gateway.tokenize import TextPool, encode

DEFAULT_MAX_NEW_TOKENS = 128

_encode = msgspec.json.Encoder().encode


class SamplingParams(SamplingFields, kw_only=True):
    """`sampling_params` of `POST /generate`."""

    min_new_tokens: Annotated[int, Meta(ge=0)] | None = None
    no_stop_trim: bool | None = None
    json_schema: Annotated[str, Meta(description="the text of a schema")] | None = None
    regex: str | None = None
    ebnf: Annotated[str, Meta(description="GBNF, or Lark")] | None = None


class GenerateRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /generate`: `text` or `input_ids`."""

    text: str | None = None
    input_ids: list[int] | None = None
    sampling_params: SamplingParams | None = None
    stream: bool | None = None
    model: str | None = None
    rid: Annotated[str, Meta(max_length=256)] | None = None
    request_id: Annotated[str, Meta(max_length=128)] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None


_decoder = msgspec.json.Decoder(GenerateRequest)
_KNOWN = {field.name for field in msgspec.structs.fields(GenerateRequest)}
_KNOWN_PARAMS = {field.name for field in msgspec.structs.fields(SamplingParams)}


def decode(body: bytes) -> Body[GenerateRequest]:
    """The request. Raises 400 naming the field at fault, 501 for what is not built."""
    fields = decode_fields(body)
    refuse_unbuilt(fields)
    try:
        request = _decoder.decode(body)
    except DECODE_ERRORS as error:
        raise invalid(error) from error
    params = decode_fields(fields["sampling_params"]) if request.sampling_params is not None else {}
    refuse_unbuilt(
        {name: raw for name, raw in params.items() if name not in _KNOWN_PARAMS}, "sampling_params."
    )
    ignored = [name for name in fields if name not in _KNOWN and name not in UNBUILT]
    ignored += [
        f"sampling_params.{name}" for name in params if name not in _KNOWN_PARAMS and name not in UNBUILT
    ]
    return Body(request, ignored)


def check(request: GenerateRequest) -> None:
    """Raise 400 for what can be told without the model."""
    if (request.text is None) == (request.input_ids is None):
        raise bad_value("text", "give either text or input_ids")
    params = request.sampling_params or SamplingParams()
    stop_strings(params.stop, "sampling_params.stop")
    check_bad_words(params, "sampling_params.")
    _form(params)


def _form(params: SamplingParams) -> Form | None:
    return native_form(params, params.json_schema, params.regex, params.ebnf)


async def prepare(request: GenerateRequest, model: LoadedModel, pool: TextPool) -> Generation:
    """Tokenize and resolve defaults. Raises 400 for what does not fit the model."""
    params = request.sampling_params or SamplingParams()
    text = request.text
    tokenizer = model.text.tokenizer

    def tokens() -> tuple[Prompts, BadWords]:
        if text is not None:
            prompts = encode(tokenizer, [text], add_special_tokens=True)
        else:
            check_token_ids(request.input_ids or [], model.card, "input_ids")
            prompts = [array("I", request.input_ids or [])]
        return prompts, encode_bad_words(tokenizer, params.bad_words)

    prompts, bad_words = await pool.run(tokens)
    grammar = await grammar_of(_form(params), model)
    wanted = params.max_tokens if params.max_new_tokens is None else params.max_new_tokens
    least = params.min_new_tokens if params.min_tokens is None else params.min_tokens
    param = "input_ids" if text is None else "text"
    limits = TokenLimits(wanted, least or 0, DEFAULT_MAX_NEW_TOKENS, "sampling_params.")
    bounds = limits.resolve(model.card, len(prompts[0]), param)
    return Generation(
        model=model,
        prompts=prompts,
        n=params.n or 1,
        samplings=[make_sampling(params, model.card, bounds, bad_words, "sampling_params.", grammar=grammar)],
        stops=stop_strings(params.stop, "sampling_params.stop"),
        include_stop=bool(params.no_stop_trim),
        skip_special_tokens=params.skip_special_tokens is not False,
        priority=request.priority or 0,
        stream=bool(request.stream),
        seeded=params.seed is not None,
    )


def model_info(card: ModelCard) -> dict[str, Any]:
    """`GET /get_model_info`. `preferred_sampling_params` are the model's own defaults, where it has any."""
    defaults = msgspec.structs.asdict(card.defaults)
    return {
        "model_path": card.root,
        "tokenizer_path": card.root,
        "is_generation": True,
        "served_model_name": card.name,
        "max_model_len": card.max_model_len,
        "vocab_size": card.vocab_size,
        "preferred_sampling_params": {name: value for name, value in defaults.items() if value is not None},
    }


class NativeAnswer:
    """Answers of `/generate`. Every event of a stream carries all of its choice's text so far."""

    def __init__(self, request_id: str, arrived: float, choices: int) -> None:
        self._request_id = request_id
        self._arrived = arrived
        self._texts = [""] * choices
        self._ids: list[list[int]] = [[] for _ in range(choices)]

    def first(self, choices: int) -> bytes:  # noqa: ARG002 - chat needs it
        """Nothing comes before the first text."""
        return b""

    def event(self, update: Update) -> bytes:
        """All text so far."""
        index = update.choice
        self._texts[index] += update.text
        self._ids[index].extend(update.ids)
        item = self._item(update, self._texts[index], self._ids[index])
        if len(self._texts) > 1:
            item["index"] = index
        return b"data: %s\n\n" % _encode(item)

    def last(self, usage: Usage) -> bytes:  # noqa: ARG002 - each event has its own figures
        """The end mark alone."""
        return DONE

    def failed(self, error: ServiceError) -> bytes:
        """The error."""
        return failed_stream(error)

    def whole(self, updates: Sequence[Update], usage: Usage) -> bytes:  # noqa: ARG002 - as above
        """One object, or a list of them when several choices were asked for."""
        items = [self._item(update, update.text, list(update.ids)) for update in updates]
        return _encode(items[0] if len(items) == 1 else items)

    def _item(self, update: Update, text: str, ids: Sequence[int]) -> dict[str, Any]:
        return {
            "text": text,
            "output_ids": ids,
            "meta_info": {
                "id": self._request_id,
                "finish_reason": _finish_reason(update),
                "prompt_tokens": update.usage.prompt_tokens,
                "completion_tokens": update.usage.completion_tokens,
                "cached_tokens": update.usage.cached_tokens,
                "e2e_latency": time.monotonic() - self._arrived,
            },
        }


def _finish_reason(update: Update) -> dict[str, Any] | None:
    if update.finish_reason is None:
        return None
    if update.finish_reason == "length":
        return {"type": "length", "length": update.usage.completion_tokens}
    return {"type": update.finish_reason, "matched": update.matched}
