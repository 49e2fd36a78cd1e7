"""What the rest of the worker needs of an engine, without torch: sequences in, what came of a step out.

`engine.py` runs a model, `mock/engine.py` makes tokens up.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Literal, NamedTuple, Protocol

from sfllm.step_curve import StepCurve
from sfllm.token_batch import NO_LOGPROBS, Logprobs
from sfllm_worker.engine.sequence import Sequence

FinishReason = Literal["stop", "length", "fault", "refused"]


class Progress(NamedTuple):
    """What a step did to one sequence: a new token, its end, or both.

    `token` is None when the token that ended it is not part of the output (`stop_token_id` then
    says which it was) or when the model's output was not finite ("fault"). With its end comes the
    `embedding` of a prompt of which that was wanted, instead of tokens. One that is "refused" cannot run
    as it was asked for: `problem` says why.
    """

    sequence: Sequence
    token: int | None
    finish: FinishReason | None = None
    stop_token_id: int = -1
    logprobs: Logprobs = NO_LOGPROBS
    embedding: Seq[float] = ()
    problem: str = ""


class PromptReport(NamedTuple):
    """Log probabilities of a sequence's prompt tokens `start ..`."""

    sequence: Sequence
    start: int
    logprobs: Logprobs


class StepShape(NamedTuple):
    """What made a step long: prompt tokens, rows of decode, and the context that these read, in tokens."""

    prefill_tokens: int
    decode_rows: int
    context_tokens: int


class StepResult(NamedTuple):
    """Everything that came of a step.

    Of an engine that launches steps ahead: who was admitted and how many were preempted is said of the
    steps launched since the last result, everything else of the oldest one.

    `seconds` is how long the step is to take at least: 0 for an engine that computes. The caller
    of an engine that makes tokens up waits for the rest of it before it looks at anything else. `shape`
    is that of the step whose tokens these are.
    """

    progress: list[Progress]
    prompt_reports: list[PromptReport]
    admitted: list[Sequence]
    preempted: int
    num_tokens: int
    seconds: float = 0.0
    shape: StepShape = StepShape(0, 0, 0)


class EngineInterface(Protocol):
    """Continuous batching over a paged KV cache. Knows nothing of sockets, clocks or requests.

    A sequence belongs to the engine from `add` until a step says that it finished, or `cancel`.
    A step that raises leaves the engine in no usable state.
    """

    shortest_first: bool
    """Whether short prompts are computed beside long ones; else in the order of arrival."""

    @property
    def follows_grammars(self) -> bool:
        """Whether sequences may have a grammar."""

    @property
    def max_sequences(self) -> int:
        """The most sequences in a step."""

    @property
    def slots(self) -> int:
        """The most sequences that it takes now, to keep a target for their speed; at least 1."""

    @property
    def pending_prefill_tokens(self) -> int:
        """Uncached tokens to compute before sequences can go on, of a single one a step's worth at most."""

    @property
    def context_lengths(self) -> list[int]:
        """How long each running sequence is, in tokens."""

    @property
    def kv_tokens(self) -> int:
        """Tokens that the cache holds in all."""

    @property
    def free_kv_tokens(self) -> int:
        """Tokens that the free blocks hold."""

    @property
    def kv_block_tokens(self) -> int:
        """Tokens in one block."""

    @property
    def num_running(self) -> int:
        """Sequences that have blocks."""

    @property
    def num_waiting(self) -> int:
        """Sequences that were added, or preempted, and wait for room."""

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence to advance, or a step whose result nobody has seen."""

    @property
    def prefix_queried_tokens(self) -> int:
        """Tokens that were looked up in the prefix cache so far."""

    @property
    def prefix_hit_tokens(self) -> int:
        """Tokens that were found there so far."""

    def close(self) -> None:
        """Let go of what would outlive it. Nothing is called after it."""

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens can be added: at least one more must have room."""

    def keep_within(self, seconds: float) -> None:
        """Size batches so that steps of decode take no longer than this, as far as that is known."""

    def follow(self, curve: StepCurve) -> None:
        """Steps take this, as measured: size batches by it if there is a target."""

    def prompt_hashes(self, sequence: Sequence) -> list[bytes]:
        """The names of a sequence's full blocks."""

    def has_block(self, block_hash: bytes) -> bool:
        """Whether the cache has the block of that name."""

    def add(self, sequence: Sequence) -> None:
        """Take a sequence. Raises ValueError when it does not fit."""

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence. Its blocks are free when no step that was launched can touch them."""

    def cancel_fork(self, sequence: Sequence, choice: int) -> None:
        """Forget a choice that has not branched off `sequence` yet."""

    def step(self) -> StepResult:
        """Run one step over whatever can run, and say what came of it."""

    def idle(self) -> bool:
        """Use a moment without work for preparations, a fraction of a second; True while more remain.

        Raises RuntimeError when there is work.
        """

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks in use are those that sequences refer to."""
