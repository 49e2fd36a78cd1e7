"""What chat and completions requests share: fields, bounds, decoding, and sampling with defaults."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from sfllm.errors import ECHO_LIMIT_CHARACTERS, ErrorCode, ServiceError
from sfllm.messages import ModelCard, Sampling
from sfllm.wire import DECODE_ERRORS
from sfllm_gateway.openai.unbuilt import UNBUILT, refuse_unbuilt

GREEDY_BELOW = 1e-5
MAX_STOPS = 16
MAX_CHOICES = 128
MAX_IGNORED_NAMES = 10
MAX_TOKEN_COUNT = 2**31 - 1

NO_EFFECT = frozenset({"metadata", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Fields about the client's own bookkeeping: nothing here could heed them, so nothing is ignored."""

T = TypeVar("T", bound=msgspec.Struct)

Count = Annotated[int, Meta(ge=1)]


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextFields(msgspec.Struct, kw_only=True):
    """Fields of every request of the OpenAI kind. null means absent."""

    model: str | None = None
    temperature: (
        Annotated[float, Meta(ge=0, le=2, description="0 is greedy; the model's own default, else 1")] | None
    ) = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, description="0 or -1: all tokens")] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, description="goes before max_tokens")] | None = None
    max_new_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1, description="lower is served first")] | None = (
        None
    )
    user: str | None = None
    request_id: Annotated[str, Meta(max_length=128)] | None = None


class Body(NamedTuple, Generic[T]):
    """A decoded request body, and the names of fields that mean nothing here."""

    request: T
    ignored: Sequence[str]


def decode_body(body: bytes, decoder: msgspec.json.Decoder[T]) -> Body[T]:
    """A request of the decoder's type. Raises 400 naming the field at fault, 501 for what is not built."""
    fields = decode_fields(body)
    refuse_unbuilt(fields)
    try:
        request = decoder.decode(body)
    except DECODE_ERRORS as error:
        raise invalid(error) from error
    known = {field.encode_name for field in msgspec.structs.fields(decoder.type)}
    ignored = [name for name in fields if name not in known and name not in UNBUILT | NO_EFFECT_ROWS]
    return Body(request, ignored)


NO_EFFECT_ROWS: dict[str, Any] = dict.fromkeys(NO_EFFECT)

_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_fields(body: bytes | msgspec.Raw) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, their values undecoded. Raises 400."""
    try:
        return _fields_decoder.decode(body)
    except DECODE_ERRORS as error:
        raise invalid(error) from error


def invalid(error: Exception, prefix: str = "") -> ServiceError:
    """The 400 for a body that does not decode; `param` is the path that msgspec names."""
    text = str(error) or type(error).__name__
    if isinstance(error, msgspec.ValidationError):
        text, _, path = text.partition(" - at `$")
        param = path.rstrip("`").lstrip(".") or None
        missing = re.search(r"missing required field `(\w+)`", text)
        if missing:
            param = f"{param}.{missing[1]}" if param else missing[1]
        param = None if param is None else (prefix + param)[:ECHO_LIMIT_CHARACTERS]
        message = f"{param}: {text}" if param else f"the body is not what is expected here: {text}"
        return ServiceError(ErrorCode.INVALID_REQUEST, message[: 2 * ECHO_LIMIT_CHARACTERS], param=param)
    if isinstance(error, RecursionError):
        text = "it is nested too deeply"
    return ServiceError(
        ErrorCode.INVALID_REQUEST, f"the body is not valid JSON: {text[:ECHO_LIMIT_CHARACTERS]}"
    )


def bad_value(param: str, message: str) -> ServiceError:
    """The 400 for a value that its type allows and its meaning does not."""
    return ServiceError(ErrorCode.INVALID_REQUEST, f"{param}: {message}", param=param)


def stop_strings(stop: str | list[str] | None, param: str = "stop") -> tuple[str, ...]:
    """The stop strings of a request, checked."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise bad_value(param, f"at most {MAX_STOPS} strings, got {len(stops)}")
    if not all(stops):
        raise bad_value(param, "a stop string must not be empty")
    return stops


def check_token_ids(ids: Sequence[int], card: ModelCard, param: str) -> None:
    """Raise 400 unless all ids are in the model's vocabulary."""
    if ids and not 0 <= min(ids) <= max(ids) < card.vocab_size:
        raise bad_value(param, f"token ids must be in 0..{card.vocab_size - 1}")


def check_stream_options(fields: TextFields) -> None:
    """Raise 400 for options of a stream that was not asked for."""
    if fields.stream_options is not None and not fields.stream:
        raise bad_value("stream_options", "only allowed together with stream")


class TokenLimits(NamedTuple):
    """The fields that bound an output, under the names that the request used."""

    wanted: int | None
    min_tokens: int
    default: int | None

    def resolve(self, card: ModelCard, prompt_tokens: int, param: str) -> tuple[int, int]:
        """`max_tokens` and `min_tokens` that fit. Raises 400 for a prompt that leaves no room."""
        room = card.max_model_len - prompt_tokens
        if prompt_tokens == 0:
            raise bad_value(param, "the prompt has no tokens")
        if room < 1:
            raise ServiceError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {prompt_tokens} tokens, but the model's context is {card.max_model_len} "
                "tokens for prompt and output together",
                param=param,
            )
        wanted = self.wanted if self.wanted is not None else self.default
        if self.wanted is not None and self.min_tokens > self.wanted:
            raise bad_value("min_tokens", f"{self.min_tokens} is more than max_tokens, {self.wanted}")
        most = room if wanted is None else min(wanted, room)
        return most, min(self.min_tokens, most)


def sampling_of(
    fields: TextFields, card: ModelCard, prompt_tokens: int, default_max: int | None, param: str
) -> Sampling:
    """How to sample for a prompt of so many tokens: the request's values, the card's, the API's."""
    wanted = next(
        (
            value
            for value in (fields.max_completion_tokens, fields.max_tokens, fields.max_new_tokens)
            if value is not None
        ),
        None,
    )
    limits = TokenLimits(wanted, fields.min_tokens or 0, default_max)
    max_tokens, min_tokens = limits.resolve(card, prompt_tokens, param)
    check_token_ids(fields.stop_token_ids or (), card, "stop_token_ids")
    return make_sampling(fields, card, max_tokens, min_tokens)


def make_sampling(fields: Any, card: ModelCard, max_tokens: int, min_tokens: int) -> Sampling:
    """`Sampling` from any struct with the usual field names; the seed is drawn if there is none."""
    defaults = card.defaults
    temperature = _first(fields.temperature, defaults.temperature, 1.0)
    top_k = _first(fields.top_k, defaults.top_k, 0)
    return Sampling(
        max_tokens=max_tokens,
        seed=secrets.randbits(63) if fields.seed is None else fields.seed,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=_first(fields.top_p, defaults.top_p, 1.0),
        top_k=0 if top_k < 0 else min(top_k, card.vocab_size),
        min_p=_first(fields.min_p, defaults.min_p, 0.0),
        min_tokens=min_tokens,
        ignore_eos=bool(fields.ignore_eos),
        stop_token_ids=tuple(fields.stop_token_ids or ()),
    )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
