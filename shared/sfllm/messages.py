"""The messages that services exchange, grouped by link, with the direction of each.

A message is one small MessagePack struct (`wire.py` frames it). Fields that hold
many numbers travel beside it as raw little-endian arrays; `array_types` names their
element types in order ("I" is uint32, "Q" is uint64, "f" is float32) and the docstring says what
each one is.

Identity. The gateway numbers its requests: `handle` is unique within one gateway
process, and (gateway routing id, handle) is unique in the system. `attempt` counts
submissions of the same request, from 0; a message of an older attempt is ignored by
whoever receives it. `choice` is the index of one of the request's `n` sequences.
`request_id` is the readable name that logs carry.
"""

from __future__ import annotations

from hashlib import sha256
from typing import ClassVar

import msgspec

ALL_CHOICES = -1
"""In a cancel: every choice of the request."""

NO_LEASE = 0
"""In a beat: the sender is no worker of this scheduler, and asks whether it is there. Leases begin at 1."""

PROBATION_TOKENS = 8
"""A request that was running when a worker crashed, and has got so many tokens further since, did not
cause the crash: what it was about to compute then has been computed."""


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of everything that crosses a socket. `kind` is the type number in the header frame."""

    kind: ClassVar[int]
    array_types: ClassVar[str] = ""


class Value(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of what messages contain."""


class Asset(Value, frozen=True):
    """A file that a gateway needs of a model, named by its content (`sha256`, lower-case hex)."""

    name: str
    sha256: str
    size_bytes: int


class GenerationDefaults(Value, frozen=True):
    """A model's own sampling defaults (its generation_config.json); None leaves the API's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class Pooling(Value, frozen=True):
    """How a model's final hidden rows become the embedding of a text, of so many `dimensions`.

    `kind` is "mean", of all tokens, or "last", the last token's row. `normalizes`: embeddings have length 1.
    """

    kind: str
    dimensions: int
    normalizes: bool = True


class ModelCard(Value, frozen=True):
    """What a gateway must know of a model to serve it. Its tokenizer and template are `assets`.

    `name` is the model's id in the API, `aliases` further names it answers to.
    `created` is in unix seconds. `max_model_len` bounds prompt plus output tokens. `quantization` is how the
    weights are held; workers that differ in it do not serve one model together. `pooling` is None for a
    model that gives no embeddings.
    """

    name: str
    aliases: tuple[str, ...]
    root: str
    created: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    assets: tuple[Asset, ...]
    defaults: GenerationDefaults = GenerationDefaults()
    quantization: str = "none"
    pooling: Pooling | None = None

    @property
    def content(self) -> tuple[object, ...]:
        """What must be the same for a request to go on at another worker of the model."""
        return self.assets, self.vocab_size, self.quantization, self.pooling

    @property
    def fingerprint(self) -> str:
        """Twelve letters for `content`, by which people compare it."""
        return sha256(msgspec.msgpack.encode(self.content)).hexdigest()[:12]


class ModelState(Value, frozen=True):
    """A card and how many workers can serve it at the moment."""

    card: ModelCard
    workers: int


class Sampling(Value, frozen=True):
    """How to choose the next token and when to stop. Values are validated by the gateway.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep everything. `seed` is always set:
    the gateway draws one for a request without. `max_tokens` and `min_tokens` count all output
    tokens of a choice, those of earlier attempts included. Stop strings stay in the gateway.

    Penalties 0, 0 and 1 do nothing. `logit_bias` pairs token ids with what is added to their logits;
    an empty `allowed_token_ids` allows all; `bad_words` are sequences of token ids, none of which may
    be completed. `logprobs` and `prompt_logprobs` are how many of the likeliest tokens to report with
    each output or prompt token besides that token itself; -1 reports nothing.

    The output follows `grammar`, which is in the form of the llguidance library; empty allows every text.
    With `pooling` (see `Pooling.kind`) nothing is generated: the prompt's embedding comes with its end.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int = -1
    prompt_logprobs: int = -1
    grammar: str = ""
    pooling: str = ""


class Capacity(Value, frozen=True):
    """What a worker can hold: `slots` sequences, `kv_tokens` of cache, `step_tokens` a step."""

    slots: int
    kv_tokens: int
    step_tokens: int


class Timings(Value, frozen=True):
    """Seconds that a request spent in each stage, measured by whoever finished it."""

    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


# gateway -> scheduler ---------------------------------------------------------------------------


class GatewayHello(Message, frozen=True):
    """Opens the link, and reopens it after the scheduler's epoch changed."""

    kind = 1
    epoch: int


class GatewayBeat(Message, frozen=True):
    """Sent every beat interval; its absence ends the gateway's requests.

    `digest` is of its open choices (`holdings.py`). When it differs from what the scheduler has, the
    scheduler asks for the list.
    """

    kind = 2
    epoch: int
    digest: int = 0


class Submit(Message, frozen=True):
    """One request.

    Arrays: prompt token ids; output tokens so far of `choices`, one after another; the names of the
    prompt's beginnings (`prefixes.py`).

    `choices` are the indices still to be generated and `generated_counts` how many tokens each
    already has (zeros on a first attempt). `milliseconds_left` is a duration, never a time of day.
    `last_worker` is the id of a worker to avoid, empty for none. Lower `priority` goes first.
    Cached prefixes are shared only among requests of the same `cache_salt`.
    `age_milliseconds` is how long ago the first attempt was submitted: a retry keeps its place in the order.
    `tenant` names who asks, for fairness and limits; empty when nobody knows.

    `suspects` is not 0 when a worker crashed while it ran this request and `suspects - 1` others, any of
    which may be the cause; `crashes_alone` counts crashes of workers that ran nothing else.
    `traceparent` is where its spans belong (`traceparent.py`), empty for a request that is not traced.
    """

    kind = 3
    array_types = "IIQ"
    request_id: str
    handle: int
    attempt: int
    model: str
    choices: tuple[int, ...]
    generated_counts: tuple[int, ...]
    sampling: Sampling
    priority: int
    milliseconds_left: int
    last_worker: str = ""
    cache_salt: str = ""
    age_milliseconds: int = 0
    suspects: int = 0
    crashes_alone: int = 0
    tenant: str = ""
    traceparent: str = ""


class Cancel(Message, frozen=True):
    """The gateway needs no more of this request (every attempt up to `attempt`), or of one choice."""

    kind = 4
    handle: int
    attempt: int
    choice: int
    reason: str


class GatewayHeld(Message, frozen=True):
    """Answers `ListHeld`: every choice that is open here. Arrays: handles, attempts, choices."""

    kind = 6
    array_types = "QII"
    number: int


class Resend(Message, frozen=True):
    """Tokens of a choice before its newest ones did not arrive: send those from `start` on again."""

    kind = 7
    handle: int
    attempt: int
    choice: int
    start: int


class GatewayBye(Message, frozen=True):
    """The gateway is leaving: cancel whatever it still has."""

    kind = 5
    epoch: int


# scheduler -> gateway ---------------------------------------------------------------------------


class GatewayWelcome(Message, frozen=True):
    """Answers `GatewayHello`. An unknown `epoch` means a new scheduler: submit everything again."""

    kind = 20
    epoch: int
    beat_seconds: float
    lease_seconds: float


class SchedulerBeat(Message, frozen=True):
    """Sent every beat interval to gateways and workers."""

    kind = 21
    epoch: int


class ListHeld(Message, frozen=True):
    """To gateways and workers: list what you hold, for your digest is not mine.

    The answer carries `number`, by which the scheduler knows what it had sent before it asked.
    """

    kind = 29
    number: int


class Models(Message, frozen=True):
    """The models that can be asked for, sent at welcome and whenever the list changes."""

    kind = 22
    models: tuple[ModelState, ...]


class Admitted(Message, frozen=True):
    """The submit was taken into the queue; it will end with `Finished`, `Rejected` or `Interrupted`."""

    kind = 23
    handle: int
    attempt: int


class Rejected(Message, frozen=True):
    """The request ended with an error, before or after it was admitted. `code` is an `ErrorCode`."""

    kind = 24
    handle: int
    attempt: int
    code: str
    message: str
    retry_after_seconds: float | None = None


class Tokens(Message, frozen=True):
    """New tokens of many requests, relayed from a worker. Arrays: see `token_batch.py`."""

    kind = 25
    array_types = "QIf"


class PromptLogprobs(Message, frozen=True):
    """Log probabilities of prompt tokens `start ..`, relayed from a worker.

    Arrays: token ids and log probabilities, `width` entries a token: the prompt's own token first,
    then the likeliest ones. The prompt's first token has none, so `start` is at least 1.
    """

    kind = 28
    array_types = "If"
    handle: int
    attempt: int
    start: int
    width: int


class Finished(Message, frozen=True):
    """A choice ended. `reason` is "stop", "length" or "abort"; `generated_tokens` its final length.

    `stop_token_id` is the token that ended it, -1 for none; that token is not part of the output.
    Array: the prompt's embedding, not normalized, of a request that asks for it, else empty.
    """

    kind = 26
    array_types = "f"
    handle: int
    attempt: int
    choice: int
    reason: str
    stop_token_id: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    timings: Timings


class Interrupted(Message, frozen=True):
    """The attempt was lost; the gateway may submit again from what it has.

    `suspects` is how many requests a crashed worker may have died of, this one among them: 1 only when it
    ran nothing else; 0 when the worker did not crash (it was drained, or a message was lost) or another
    request is suspected.
    """

    kind = 27
    handle: int
    attempt: int
    cause: str
    worker: str
    suspects: int = 0


# worker -> scheduler ----------------------------------------------------------------------------


class WorkerHello(Message, frozen=True):
    """Opens the link. `worker_id` is made at process start and never used again by another."""

    kind = 40
    worker_id: str
    card: ModelCard
    capacity: Capacity


class WorkerBeat(Message, frozen=True):
    """Sent every beat interval: what the worker holds. `step` grows with every step it runs.

    `digest` is of the choices that it holds (`holdings.py`); see `GatewayBeat`. `slots` is how many
    sequences it takes now, 0 for as many as its hello said. `step_curve` is what its steps take, as
    measured (`step_curve.py`), empty while that is unknown. `bands` counts its running sequences by the
    length band (`bands.py`) of their context, from band 0 on. Array: the names of the beginnings of
    prompts that its cache has, most recently used first, `MAX_SUMMARY_PREFIXES` at most (`prefixes.py`).
    """

    kind = 41
    array_types = "Q"
    lease: int
    step: int
    running: int
    waiting: int
    free_kv_tokens: int
    digest: int = 0
    slots: int = 0
    step_curve: tuple[float, ...] = ()
    bands: tuple[int, ...] = ()


class WorkerTokens(Message, frozen=True):
    """Tokens of one step for one gateway, named by its routing id. Arrays as in `Tokens`."""

    kind = 42
    array_types = "QIf"
    lease: int
    gateway: bytes


class WorkerPromptLogprobs(Message, frozen=True):
    """Log probabilities of prompt tokens for one gateway. Arrays as in `PromptLogprobs`."""

    kind = 47
    array_types = "If"
    lease: int
    gateway: bytes
    logprobs: PromptLogprobs


class WorkerFinished(Message, frozen=True):
    """A choice ended; when the last choice of a request has, its credit returns. Array as in `Finished`."""

    kind = 43
    array_types = "f"
    lease: int
    gateway: bytes
    finished: Finished


class WorkerFault(Message, frozen=True):
    """The worker could not serve this request, and its blocks are free again."""

    kind = 44
    lease: int
    gateway: bytes
    handle: int
    attempt: int
    code: str
    message: str


class WorkerBye(Message, frozen=True):
    """The worker holds nothing any more and is leaving: it was drained, or `failure` says what broke it."""

    kind = 45
    lease: int
    failure: str = ""


class WorkerDraining(Message, frozen=True):
    """The worker was told to stop: finish what it holds, grant nothing more."""

    kind = 46
    lease: int


class WorkerHeld(Message, frozen=True):
    """Answers `ListHeld`: every choice that is open here.

    Arrays: indices into `gateways`, handles, attempts, choices.
    """

    kind = 48
    array_types = "IQII"
    lease: int
    number: int
    gateways: tuple[bytes, ...]


class WorkerProgress(Message, frozen=True):
    """Sent after a step that took in prompt tokens: how much is left to prefill here.

    `grants` counts the `Grant`s that came under this lease, `pending_tokens` the uncached tokens of their
    requests that are still to be computed before a first token can be chosen; of a single request at most
    one step's budget counts, because a worker computes others beside a long one. The scheduler adds what it
    granted since, so both sides agree however late this comes.
    """

    kind = 50
    lease: int
    grants: int
    pending_tokens: int


class WorkerReturned(Message, frozen=True):
    """A request that was granted and has not been started: another worker had better run it.

    A worker that drains says it of all that it has not begun, and any worker in answer to `Recall`.
    """

    kind = 49
    lease: int
    gateway: bytes
    handle: int
    attempt: int


# scheduler -> worker ----------------------------------------------------------------------------


class WorkerWelcome(Message, frozen=True):
    """Answers `WorkerHello`. Every later message of the worker carries `lease`; others are stale.

    A worker that hears no beat for `lease_seconds` cancels all that it holds and says hello again.
    `shortest_first`: prompts much shorter than what is left of the oldest one have half of every step's
    prefill, shortest first; otherwise prompts are computed in the order of arrival.
    """

    kind = 60
    epoch: int
    lease: int
    beat_seconds: float
    lease_seconds: float
    shortest_first: bool = False


class GrantedRequest(Value, frozen=True):
    """One request of a cohort. Its tokens are slices of the grant's arrays, in order.

    `queue_seconds` is how long it waited in the scheduler. `traceparent` is as in `Submit`.
    """

    gateway: bytes
    request_id: str
    handle: int
    attempt: int
    choices: tuple[int, ...]
    prompt_count: int
    generated_counts: tuple[int, ...]
    sampling: Sampling
    queue_seconds: float
    cache_salt: str = ""
    prefix_count: int = 0
    traceparent: str = ""


class Grant(Message, frozen=True):
    """A cohort of requests to run.

    Arrays: all prompts, all output tokens of earlier attempts, the names of all prompts' beginnings.
    """

    kind = 61
    array_types = "IIQ"
    lease: int
    requests: tuple[GrantedRequest, ...]


class WorkerCancel(Message, frozen=True):
    """Free this request (every attempt up to `attempt`), or one choice of it."""

    kind = 62
    lease: int
    gateway: bytes
    handle: int
    attempt: int
    choice: int


class WorkerResend(Message, frozen=True):
    """Send the tokens of a choice again, from `start` on, if it still runs."""

    kind = 64
    lease: int
    gateway: bytes
    handle: int
    attempt: int
    choice: int
    start: int


class Recall(Message, frozen=True):
    """Give this request back (`WorkerReturned`) if it has not been started; otherwise nothing happens."""

    kind = 66
    lease: int
    gateway: bytes
    handle: int
    attempt: int


class WorkerUnknown(Message, frozen=True):
    """Answers a message without a valid lease: drop what you hold and say hello again."""

    kind = 65
    epoch: int


class Drain(Message, frozen=True):
    """Finish what you hold, take nothing more, then leave."""

    kind = 63
    lease: int


# assets, on a socket of their own, in either direction ------------------------------------------


class AssetOffer(Message, frozen=True):
    """Worker -> scheduler: these assets can be had from me."""

    kind = 80
    assets: tuple[Asset, ...]


class AssetGet(Message, frozen=True):
    """Asks for the chunk of an asset that starts at `offset`; one is outstanding at a time."""

    kind = 81
    sha256: str
    offset: int


class AssetChunk(Message, frozen=True):
    """A chunk of an asset. An empty `data` before the end means: not here (any more)."""

    kind = 82
    sha256: str
    offset: int
    total_bytes: int
    data: bytes


GATEWAY_TO_SCHEDULER: tuple[type[Message], ...] = (
    GatewayHello,
    GatewayBeat,
    Submit,
    Cancel,
    GatewayHeld,
    Resend,
    GatewayBye,
)
SCHEDULER_TO_GATEWAY: tuple[type[Message], ...] = (
    GatewayWelcome,
    SchedulerBeat,
    ListHeld,
    Models,
    Admitted,
    Rejected,
    Tokens,
    PromptLogprobs,
    Finished,
    Interrupted,
)
WORKER_TO_SCHEDULER: tuple[type[Message], ...] = (
    WorkerHello,
    WorkerBeat,
    WorkerTokens,
    WorkerPromptLogprobs,
    WorkerFinished,
    WorkerFault,
    WorkerHeld,
    WorkerProgress,
    WorkerReturned,
    WorkerDraining,
    WorkerBye,
)
SCHEDULER_TO_WORKER: tuple[type[Message], ...] = (
    WorkerWelcome,
    WorkerUnknown,
    SchedulerBeat,
    ListHeld,
    Grant,
    WorkerCancel,
    WorkerResend,
    Recall,
    Drain,
)
ASSETS: tuple[type[Message], ...] = (AssetOffer, AssetGet, AssetChunk)
