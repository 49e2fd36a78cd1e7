"""What engines have in common: a planner's view of sequences, and the rules by which one ends."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from sfllm.batch_sizing import BatchSizing
from sfllm.messages import Sampling
from sfllm.step_curve import StepCurve
from sfllm.token_batch import Logprobs
from sfllm_worker.engine.interface import Progress, StepShape
from sfllm_worker.engine.planner import Limits, Planner, Row, StepPlan
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.kv.block_pool import BlockPool


class PlannedEngine:
    """Owner of the planner: all of an `EngineInterface` but its `step`.

    `num_blocks` counts the padding block. `eos_token_ids` end a sequence unless it ignores them; no
    sequence grows beyond `max_model_len` tokens.
    """

    def __init__(self, limits: Limits, num_blocks: int, eos_token_ids: Seq[int], max_model_len: int) -> None:
        self.planner = Planner(limits, BlockPool(num_blocks))
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_model_len = max_model_len

    @property
    def follows_grammars(self) -> bool:
        """It does not, unless there is something that compiles them."""
        return False

    @property
    def max_sequences(self) -> int:
        """The most sequences in a step."""
        return self.planner.limits.max_sequences

    @property
    def shortest_first(self) -> bool:
        """Whether short prompts are computed beside long ones."""
        return self.planner.shortest_first

    @shortest_first.setter
    def shortest_first(self, value: bool) -> None:
        self.planner.shortest_first = value

    @property
    def slots(self) -> int:
        """The most sequences that it takes now."""
        return self.planner.slots

    @property
    def pending_prefill_tokens(self) -> int:
        """Uncached tokens to compute before sequences can go on."""
        return self.planner.pending_tokens

    @property
    def context_lengths(self) -> list[int]:
        """How long each running sequence is, in tokens."""
        return [len(sequence.tokens) for sequence in self.planner.running]

    def follow(self, curve: StepCurve) -> None:
        """Steps take this, as measured: size batches by it if there is a target."""
        lengths = self.context_lengths
        if self.planner.sizing is not None and lengths:
            self.planner.sizing.follow(curve, sum(lengths) / len(lengths))

    def keep_within(self, seconds: float) -> None:
        """Size batches so that steps of decode take no longer than this, as far as that is known."""
        self.planner.sizing = BatchSizing(seconds, self.max_sequences)

    def prompt_hashes(self, sequence: Sequence) -> list[bytes]:
        """The names of a sequence's full blocks."""
        return self.planner.prefixes.hashes_of(sequence)

    def has_block(self, block_hash: bytes) -> bool:
        """Whether the cache has the block of that name."""
        return self.planner.prefixes.has(block_hash)

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence to advance, or a step whose result nobody has seen."""
        return self.planner.has_work

    @property
    def num_running(self) -> int:
        """Sequences that have blocks."""
        return len(self.planner.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that were added, or preempted, and wait for room."""
        return len(self.planner.waiting)

    @property
    def kv_block_tokens(self) -> int:
        """Tokens in one block."""
        return self.planner.limits.block_size

    @property
    def kv_tokens(self) -> int:
        """Tokens that the cache holds in all."""
        return self.planner.pool.num_blocks * self.planner.limits.block_size

    @property
    def free_kv_tokens(self) -> int:
        """Tokens that the free blocks hold."""
        return self.planner.pool.num_free * self.planner.limits.block_size

    @property
    def prefix_queried_tokens(self) -> int:
        """Tokens that were looked up in the prefix cache so far."""
        return self.planner.prefixes.queried_tokens

    @property
    def prefix_hit_tokens(self) -> int:
        """Tokens that were found there so far."""
        return self.planner.prefixes.hit_tokens

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens can be added: at least one more must have room."""
        return 0 < num_tokens < self.max_model_len

    def add(self, sequence: Sequence) -> None:
        """Take a sequence of 1 .. max_model_len - 1 tokens. Raises ValueError for any other length."""
        if not self.fits(len(sequence.tokens)):
            raise ValueError(f"{len(sequence.tokens)} tokens do not fit a context of {self.max_model_len}")
        sampling = sequence.sampling
        sequence.length_limit = min(sequence.prompt_count + sampling.max_tokens, self.max_model_len)
        sequence.needs_its_tokens = _needs_its_tokens(sampling)
        self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        self.planner.add(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence. Its blocks are free when no step that was launched can touch them."""
        self.planner.remove(sequence)

    def cancel_fork(self, sequence: Sequence, choice: int) -> None:
        """Forget a choice that has not branched off `sequence` yet."""
        self.planner.drop_fork(sequence, choice)

    def close(self) -> None:
        """Let go of what would outlive it."""

    def idle(self) -> bool:
        """There is nothing to prepare."""
        if self.has_work:
            raise RuntimeError("a sequence that waits comes before preparations")
        return False

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks in use are those that sequences refer to."""
        self.planner.check_integrity()

    def _branches(self, sequence: Sequence) -> list[Sequence]:
        """A sequence that is fully computed, and the choices that branch off it now."""
        return [sequence, *(self.planner.fork(sequence, choice) for choice in sequence.fork_choices)]

    def _banned(self, sequence: Sequence) -> tuple[int, ...]:
        """Tokens that may not come next: those that would end a sequence below its `min_tokens`.

        After the end of text a grammar has nothing more to say, so that one who ignores it goes without.
        """
        sampling = sequence.sampling
        if sequence.generated + sequence.unread < sampling.min_tokens:
            return self.eos_token_ids + sampling.stop_token_ids
        ignores_eos = sampling.ignore_eos and sequence.constraint is not None
        return self.eos_token_ids if ignores_eos else ()

    def _advance_by(self, sequence: Sequence, token: int, logprobs: Logprobs) -> Progress:
        """`token` comes next: the sequence ends with it, ends before it or goes on."""
        sampling, constraint = sequence.sampling, sequence.constraint
        if constraint is not None and constraint.problem:
            return self._refuse(sequence, constraint.problem)
        is_eos = token in self.eos_token_ids and (constraint is not None or not sampling.ignore_eos)
        if is_eos or token in sampling.stop_token_ids:
            self.planner.remove(sequence)
            return Progress(sequence, None, "stop", token)
        if constraint is not None and not constraint.consume((token,)):
            return self._refuse(sequence, constraint.problem)
        sequence.tokens.append(token)
        if constraint is not None and constraint.is_complete:
            self.planner.remove(sequence)
            return Progress(sequence, token, "stop", logprobs=logprobs)
        if len(sequence.tokens) >= sequence.length_limit:
            self.planner.remove(sequence)
            return Progress(sequence, token, "length", logprobs=logprobs)
        return Progress(sequence, token, logprobs=logprobs)

    def _refuse(self, sequence: Sequence, problem: str) -> Progress:
        self.planner.remove(sequence)
        return Progress(sequence, None, "refused", problem=f"the grammar cannot be followed: {problem}")


def shape_of(plan: StepPlan) -> StepShape:
    """What made a planned step long. Rows of one token stand first."""
    prefill = decodes = context = 0
    for _, num_tokens, start, _ in plan.rows:
        if num_tokens == 1:
            decodes += 1
            context += start + 1
        else:
            prefill += num_tokens
    return StepShape(prefill, decodes, context)


class PromptSpan(NamedTuple):
    """Prompt tokens `start .. start + num_tokens` of a sequence, whose log probabilities a step gives."""

    sequence: Sequence
    start: int
    num_tokens: int


def prompt_spans(plan: StepPlan) -> list[PromptSpan]:
    """The prompt tokens that a planned step predicts and whose log probabilities are wanted."""
    return [
        span
        for row in plan.rows
        if row.sequence.sampling.prompt_logprobs >= 0 and (span := _prompt_span(row)) is not None
    ]


def _prompt_span(row: Row) -> PromptSpan | None:
    """The prompt tokens that a row predicts and that were not reported yet."""
    sequence = row.sequence
    start = max(sequence.reported_prompt, row.start + 1)
    end = min(sequence.prompt_count, row.start + row.num_tokens + 1)
    return PromptSpan(sequence, start, end - start) if start < end else None


def _needs_its_tokens(sampling: Sampling) -> bool:
    """Whether choosing a token needs all before it: penalties, bad words of several tokens, grammars."""
    penalties = sampling.frequency_penalty or sampling.presence_penalty or sampling.repetition_penalty != 1
    return bool(penalties or sampling.grammar) or any(len(word) > 1 for word in sampling.bad_words)
