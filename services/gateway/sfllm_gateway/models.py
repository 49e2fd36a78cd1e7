"""The models that can be asked for: cards from the scheduler, tokenizers and templates made from assets.

A gateway has no model files. It hears of a model by its card, pulls the few files that
text needs, named by content hash, and keeps what it made of them while the model is
known (and a few after that), so that a model that comes back costs nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import structlog
from tokenizers import Tokenizer

from sfllm.asset_pull import AssetError
from sfllm.errors import ErrorCode, ServiceError, quote
from sfllm.messages import Asset, ModelCard, ModelState
from sfllm_gateway.detokenize import Detokenizers
from sfllm_gateway.dialect import Dialect, DialectChoice
from sfllm_gateway.grammars import GrammarPool, ModelGrammars
from sfllm_gateway.rendering import ChatTemplate, RenderPool
from sfllm_gateway.tokenize import TextPool

FIRST_RETRY_SECONDS = 1.0
LAST_RETRY_SECONDS = 30.0
KEPT_UNUSED = 4
KEPT_NAMES = 256

TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"

log = structlog.get_logger()


class TextTools(NamedTuple):
    """What turns messages to tokens and tokens to text, and tries out what a text shall follow.

    `template` is None for a model without chat. `config` is the model's tokenizer_config.json, with
    special tokens as plain strings.
    """

    tokenizer: Tokenizer
    detokenizers: Detokenizers
    template: ChatTemplate | None
    config: dict[str, Any]
    grammars: ModelGrammars
    dialect: Dialect = Dialect()


class LoadedModel(NamedTuple):
    """A model that requests can be made for."""

    card: ModelCard
    text: TextTools


class ModelRegistry:
    """Knows the models by all their names. `pull` fetches an asset; `start` and `close` own the loader."""

    def __init__(
        self,
        pull: Callable[[Asset], Awaitable[bytes]],
        pool: TextPool,
        renderers: RenderPool,
        grammars: GrammarPool,
        on_change: Callable[[], None],
        dialects: DialectChoice = DialectChoice(),  # noqa: B008 - immutable
    ) -> None:
        self._pull = pull
        self._pool = pool
        self._renderers = renderers
        self._grammars = grammars
        self._dialects = dialects
        self._on_change = on_change
        self._states: tuple[ModelState, ...] = ()
        self._by_name: dict[str, ModelState] = {}
        self._absent: dict[str, None] = {}
        self._tools: dict[tuple[Asset, ...], TextTools] = {}
        self._failures: dict[tuple[Asset, ...], str] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to load what `update` announces."""
        self._task = asyncio.get_running_loop().create_task(self._load_for_ever(), name="models")

    async def close(self) -> None:
        """Stop loading."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def update(self, states: Sequence[ModelState]) -> None:
        """Take the scheduler's present list. It comes again with every beat."""
        if tuple(states) == self._states:
            return
        known = self._absent | dict.fromkeys(self._by_name)
        self._states = tuple(states)
        self._by_name = {}
        for state in states:
            for name in (state.card.name, *state.card.aliases):
                self._by_name.setdefault(name, state)
        absent = [name for name in known if name not in self._by_name]
        self._absent = dict.fromkeys(absent[-KEPT_NAMES:])
        self._changed.set()
        self._on_change()

    def named_cards(self) -> list[tuple[str, ModelCard]]:
        """Every name that can be asked for, with its card."""
        return [(name, state.card) for name, state in self._by_name.items()]

    def overview(self) -> list[dict[str, Any]]:
        """Each model once: its names, and how many workers can serve it."""
        return [
            {
                "id": state.card.name,
                "aliases": state.card.aliases,
                "max_model_len": state.card.max_model_len,
                "workers": state.workers,
            }
            for state in self._states
        ]

    def card(self, name: str) -> ModelCard:
        """The card of a model by any of its names.

        Raises 404, or 503 before any model is known and for one that was known: a scheduler that was
        restarted learns of its models one by one.
        """
        if not self._by_name:
            raise ServiceError(
                ErrorCode.SERVICE_UNAVAILABLE, "no model is being served yet", retry_after_seconds=1
            )
        if name in self._absent:
            raise ServiceError(
                ErrorCode.SERVICE_UNAVAILABLE,
                f"the model {quote(name)} is not being served at the moment",
                retry_after_seconds=1,
            )
        if name not in self._by_name:
            raise ServiceError(
                ErrorCode.MODEL_NOT_FOUND, f"the model {quote(name)} does not exist", param="model"
            )
        return self._by_name[name].card

    def resolve(self, name: str | None) -> LoadedModel:
        """The model of a request. Without a name it is the only one there is."""
        if name is None:
            if len(self._states) > 1:
                raise ServiceError(
                    ErrorCode.INVALID_REQUEST, "several models are served: name one", param="model"
                )
            name = self._states[0].card.name if self._states else ""
        card = self.card(name)
        tools = self._tools.get(card.assets)
        if tools is None:
            reason = self._failures.get(card.assets, "its tokenizer is being loaded")
            raise ServiceError(
                ErrorCode.SERVICE_UNAVAILABLE,
                f"the model {quote(card.name)} cannot be served yet: {reason}",
                retry_after_seconds=1,
            )
        return LoadedModel(card, tools)

    def problem(self) -> str | None:
        """Why no model can be served at the moment; None if one can."""
        if not self._states:
            return "no model is known"
        if not any(state.workers for state in self._states):
            return "no worker is there"
        if any(state.workers and state.card.assets in self._tools for state in self._states):
            return None
        return next(iter(self._failures.values()), "the tokenizer is being loaded")

    async def _load_for_ever(self) -> None:
        retry_seconds = FIRST_RETRY_SECONDS
        while True:
            try:
                async with asyncio.timeout(retry_seconds if self._failures else None):
                    await self._changed.wait()
                retry_seconds = FIRST_RETRY_SECONDS
            except TimeoutError:  # time to try the failed ones again
                retry_seconds = min(2 * retry_seconds, LAST_RETRY_SECONDS)
            self._changed.clear()
            for state in self._states:
                if state.card.assets not in self._tools:
                    await self._load(state.card)
            self._forget_unused()

    async def _load(self, card: ModelCard) -> None:
        try:
            contents = {asset.name: await self._pull(asset) for asset in card.assets}
            tools = await self._pool.run(lambda: self._make_tools(contents))
            if tools.template is not None and (problem := await tools.template.problem()) is not None:
                log.warning("chat template does not compile, chat is off", reason=problem)
                tools = tools._replace(template=None)
        except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception for a bad file
            reason = str(error) if isinstance(error, AssetError) else f"bad tokenizer files ({error})"
            if self._failures.get(card.assets) != reason:
                log.warning("tokenizer not loaded", model=card.name, reason=reason)
            self._failures[card.assets] = reason
            return
        self._failures.pop(card.assets, None)
        self._tools[card.assets] = tools
        self._on_change()
        log.info("model ready for requests", model=card.name, aliases=card.aliases)

    def _make_tools(self, contents: dict[str, bytes]) -> TextTools:
        return make_tools(contents, self._renderers, self._grammars, self._dialects)

    def _forget_unused(self) -> None:
        used = {state.card.assets for state in self._states}
        unused = [key for key in self._tools if key not in used]
        for key in unused[: max(len(unused) - KEPT_UNUSED, 0)]:
            del self._tools[key]
        self._failures = {key: reason for key, reason in self._failures.items() if key in used}


def make_tools(
    files: dict[str, bytes],
    renderers: RenderPool,
    grammars: GrammarPool,
    dialects: DialectChoice = DialectChoice(),  # noqa: B008 - immutable
) -> TextTools:
    """Tokenizer and template from a model's files. Raises whatever their parsers raise."""
    if TOKENIZER not in files:
        raise AssetError(f"the model has no {TOKENIZER}")
    tokenizer = Tokenizer.from_buffer(files[TOKENIZER])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config: dict[str, Any] = msgspec.json.decode(files.get(CONFIG, b"{}"), type=dict[str, Any])
    special_tokens = _special_tokens(config)
    source = files[TEMPLATE].decode() if TEMPLATE in files else _default_template(config.get("chat_template"))
    template = ChatTemplate(renderers, source, special_tokens) if source else None
    return TextTools(
        *(tokenizer, Detokenizers(tokenizer), template, config | special_tokens),
        ModelGrammars(grammars, tokenizer),
        dialects.of(source or ""),
    )


def _default_template(value: Any) -> str | None:
    """`chat_template` of a tokenizer_config.json: one template, or a list of named ones."""
    if isinstance(value, list):
        return next((entry.get("template") for entry in value if entry.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The tokens that templates call by name; each is a string or an object with `content`."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
