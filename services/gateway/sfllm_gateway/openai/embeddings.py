"""`POST /v1/embeddings`: a row of numbers for each text, which says what it is about."""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sfllm.errors import ErrorCode, ServiceError, quote
from sfllm.messages import Pooling, Sampling
from sfllm_gateway.generation import Generation, Prompts, Update, Usage
from sfllm_gateway.models import LoadedModel
from sfllm_gateway.openai.body import bad_value
from sfllm_gateway.openai.completions import from_ids, split_prompts
from sfllm_gateway.openai.sampling import TokenLimits, truncate
from sfllm_gateway.tokenize import TextPool, encode

MAX_INPUTS = 1024

_encode = msgspec.json.Encoder().encode


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """Body of `POST /v1/embeddings`."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, description="keep so many of the numbers, normalized")] | None = (
        None
    )
    truncate_prompt_tokens: (
        Annotated[int, Meta(ge=-1, description="keep so many tokens at the end; -1: as many as fit")] | None
    ) = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1, description="lower is served first")] | None = (
        None
    )
    user: str | None = None
    request_id: Annotated[str, Meta(max_length=128)] | None = None


decoder = msgspec.json.Decoder(EmbeddingRequest)


def check(request: EmbeddingRequest) -> None:
    """Raise 400 for what can be told without the model."""
    if len(split_prompts(request.input, "input")) > MAX_INPUTS:
        raise bad_value("input", f"at most {MAX_INPUTS} texts in one request")


async def prepare(request: EmbeddingRequest, model: LoadedModel, pool: TextPool) -> Generation:
    """Tokenize. Raises 501 for a model that makes no embeddings, 400 for what does not fit the model."""
    pooling = _pooling(request, model)
    given = split_prompts(request.input, "input")
    texts = [item for item in given if isinstance(item, str)]
    limits = TokenLimits(1, 0, None)

    def tokens() -> Prompts:
        if texts:
            whole = encode(model.text.tokenizer, texts, request.add_special_tokens is not False)
        else:
            whole = from_ids([item for item in given if isinstance(item, list)], model, "input")
        return [truncate(ids, request.truncate_prompt_tokens, limits, model.card) for ids in whole]

    prompts = await pool.run(tokens)
    for prompt in prompts:
        limits.resolve(model.card, len(prompt), "input")
    return Generation(
        model=model,
        prompts=prompts,
        n=1,
        samplings=[Sampling(max_tokens=1, seed=0, pooling=pooling.kind)] * len(prompts),
        priority=request.priority or 0,
    )


def _pooling(request: EmbeddingRequest, model: LoadedModel) -> Pooling:
    pooling = model.card.pooling
    if pooling is None:
        raise ServiceError(
            ErrorCode.NOT_SUPPORTED,
            f"the model {quote(model.card.name)} makes no embeddings; --pooling tells its workers how",
            param="model",
        )
    if request.dimensions is not None and request.dimensions > pooling.dimensions:
        raise bad_value("dimensions", f"the model's embeddings have {pooling.dimensions}")
    return pooling


class EmbeddingAnswer:
    """The answer to one request. It has no stream."""

    def __init__(self, request: EmbeddingRequest, generation: Generation) -> None:
        pooling = generation.model.card.pooling
        assert pooling is not None
        self._model = generation.model.card.name
        self._dimensions = request.dimensions or pooling.dimensions
        self._normalizes = pooling.normalizes or request.dimensions is not None
        self._base64 = request.encoding_format == "base64"

    def whole(self, updates: Sequence[Update], usage: Usage) -> bytes:
        """The embeddings in the order of the texts."""
        counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        data = [
            {"object": "embedding", "index": update.choice, "embedding": self._shown(update.embedding)}
            for update in updates
        ]
        return _encode({"object": "list", "data": data, "model": self._model, "usage": counts})

    def _shown(self, row: Sequence[float]) -> Any:
        row = row[: self._dimensions]
        if self._normalizes:
            row = normalized(row)
        # Little-endian float32, as OpenAI's clients ask for unless they are told otherwise.
        return base64.b64encode(array("f", row)).decode() if self._base64 else list(row)

    def first(self, choices: int) -> bytes:  # noqa: ARG002 - see whole
        """Nothing."""
        return b""

    def event(self, update: Update) -> bytes:  # noqa: ARG002 - see whole
        """Nothing."""
        return b""

    def last(self, usage: Usage) -> bytes:  # noqa: ARG002 - see whole
        """Nothing."""
        return b""

    def failed(self, error: ServiceError) -> bytes:  # noqa: ARG002 - see whole
        """Nothing."""
        return b""


def normalized(row: Sequence[float]) -> list[float]:
    """The row at length 1; zeros stay."""
    length = math.hypot(*row)
    return [value / length for value in row] if length > 0 else list(row)
