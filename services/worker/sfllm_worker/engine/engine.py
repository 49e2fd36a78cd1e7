"""The engine: sequences in, tokens out, one step at a time.

A step is planned (`planner.py`), its inputs are laid out, the model runs, tokens are
sampled and the sequences advance. The engine knows nothing of sockets, clocks or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import accumulate, starmap
from typing import Literal, NamedTuple

import torch

from sfllm.token_batch import NO_LOGPROBS, Logprobs
from sfllm_worker.engine.planner import Limits, Planner, Row, StepPlan
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.graphs.runner import GraphRunner, StepInputs
from sfllm_worker.kv.block_pool import BlockPool
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.logprobs import token_logprobs
from sfllm_worker.sampling.sampler import sample

FinishReason = Literal["stop", "length", "fault"]


class Progress(NamedTuple):
    """What a step did to one sequence: a new token, its end, or both.

    `token` is None when the token that ended it is not part of the output (`stop_token_id` then
    says which it was) or when the model's output was not finite ("fault").
    """

    sequence: Sequence
    token: int | None
    finish: FinishReason | None = None
    stop_token_id: int = -1
    logprobs: Logprobs = NO_LOGPROBS


class PromptReport(NamedTuple):
    """Log probabilities of a sequence's prompt tokens `start ..`."""

    sequence: Sequence
    start: int
    logprobs: Logprobs


class StepResult(NamedTuple):
    """Everything that changed in a step."""

    progress: list[Progress]
    prompt_reports: list[PromptReport]
    admitted: list[Sequence]
    preempted: int
    num_tokens: int


class Engine:
    """Owner of the planner, the KV cache and the runner.

    `eos_token_ids` end a sequence unless it ignores them; no sequence grows beyond
    `max_model_len` tokens.
    """

    def __init__(
        self,
        runner: GraphRunner,
        kv: KVCache,
        limits: Limits,
        eos_token_ids: Seq[int],
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.planner = Planner(limits, BlockPool(kv.num_blocks))
        self._runner = runner
        self._kv = kv
        self._eos_token_ids = tuple(eos_token_ids)
        self.max_model_len = max_model_len
        self._device = device

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence to advance."""
        return self.planner.has_work

    @property
    def kv_tokens(self) -> int:
        """Tokens that the cache holds in all."""
        return self.planner.pool.num_blocks * self.planner.limits.block_size

    @property
    def free_kv_tokens(self) -> int:
        """Tokens that the free blocks hold."""
        return self.planner.pool.num_free * self.planner.limits.block_size

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens can be added: at least one more must have room."""
        return 0 < num_tokens < self.max_model_len

    def add(self, sequence: Sequence) -> None:
        """Take a sequence of 1 .. max_model_len - 1 tokens. Raises ValueError for any other length."""
        if not self.fits(len(sequence.tokens)):
            raise ValueError(f"{len(sequence.tokens)} tokens do not fit a context of {self.max_model_len}")
        self.planner.add(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks."""
        self.planner.remove(sequence)

    def cancel_fork(self, sequence: Sequence, choice: int) -> None:
        """Forget a choice that has not branched off `sequence` yet."""
        self.planner.drop_fork(sequence, choice)

    @torch.inference_mode()
    def step(self) -> StepResult:
        """Run one step over whatever can run, and say what came of it."""
        plan = self.planner.plan()
        if not plan.rows:
            return StepResult([], [], plan.admitted, len(plan.preempted), 0)
        if plan.copies:
            self._kv.copy_blocks(plan.copies)
        completed = [index for index, row in enumerate(plan.rows) if row.completes]
        targets = [plan.rows[index] for index in completed]
        spans = [
            span
            for row in plan.rows
            if row.sequence.sampling.prompt_logprobs >= 0 and (span := _prompt_span(row)) is not None
        ]
        inputs = self._inputs(plan, completed, spans)
        logits = self._runner.run(inputs)
        # Each completed sequence gets a token now or ends, so `computed` stays below its length.
        self.planner.commit(plan)
        reports = _report(spans, logits[len(targets) :])
        progress = self._advance(targets, logits[: len(targets)]) if targets else []
        return StepResult(progress, reports, plan.admitted, len(plan.preempted), len(inputs.token_ids))

    def _inputs(self, plan: StepPlan, completed: list[int], spans: list[_PromptSpan]) -> StepInputs:
        """Lay out a step. Logits are wanted of the completed rows' last tokens, then of the spans."""
        token_ids: list[int] = []
        for sequence, count in plan.rows:
            token_ids += sequence.tokens[sequence.computed : sequence.computed + count]
        batch = AttentionBatch.build(
            query_lens=[row.num_tokens for row in plan.rows],
            context_lens=[row.sequence.computed + row.num_tokens for row in plan.rows],
            block_tables=[row.sequence.block_table for row in plan.rows],
            block_size=self.planner.limits.block_size,
            device=self._device,
        )
        ends = list(accumulate(row.num_tokens for row in plan.rows))
        wanted = [ends[index] - 1 for index in completed]
        row_of = {id(row.sequence): index for index, row in enumerate(plan.rows)} if spans else {}
        for sequence, start, count in spans:
            index = row_of[id(sequence)]
            first = ends[index] - plan.rows[index].num_tokens + start - 1 - sequence.computed
            wanted += range(first, first + count)
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        return StepInputs(ids, batch, torch.tensor(wanted, dtype=torch.int64, device=self._device))

    def _advance(self, targets: list[Row], logits: torch.Tensor) -> list[Progress]:
        """Sample a token for every sequence that is fully computed, its forks included."""
        sequences: list[Sequence] = []
        logit_rows: list[int] = []
        for index, row in enumerate(targets):
            branches = [row.sequence]
            branches += [self.planner.fork(row.sequence, choice) for choice in row.sequence.fork_choices]
            sequences += branches
            logit_rows += [index] * len(branches)
        if len(sequences) > len(targets):
            logits = logits[logit_rows]
        sampled = sample(logits, [self._sampling_row(sequence) for sequence in sequences])
        return list(starmap(self._take, zip(sequences, *sampled, strict=True)))

    def _sampling_row(self, sequence: Sequence) -> SamplingRow:
        sampling = sequence.sampling
        too_short = sampling.min_tokens and sequence.generated < sampling.min_tokens
        banned = self._eos_token_ids + sampling.stop_token_ids if too_short else ()
        return SamplingRow(sampling, sequence.choice, sequence.tokens, sequence.prompt_count, banned)

    def _take(self, sequence: Sequence, token: int, sound: bool, logprobs: Logprobs) -> Progress:
        if not sound:
            # A NaN left in a free block would spoil the next sequence even where it is masked.
            self._kv.zero_blocks(self.planner.spoil(sequence))
            self.planner.remove(sequence)
            return Progress(sequence, None, "fault")
        sampling = sequence.sampling
        is_eos = token in self._eos_token_ids and not sampling.ignore_eos
        if is_eos or token in sampling.stop_token_ids:
            self.planner.remove(sequence)
            return Progress(sequence, None, "stop", token)
        sequence.tokens.append(token)
        if sequence.generated >= sampling.max_tokens or len(sequence.tokens) >= self.max_model_len:
            self.planner.remove(sequence)
            return Progress(sequence, token, "length", logprobs=logprobs)
        return Progress(sequence, token, logprobs=logprobs)


class _PromptSpan(NamedTuple):
    """Prompt tokens `start .. start + num_tokens` of a sequence, whose log probabilities this step gives."""

    sequence: Sequence
    start: int
    num_tokens: int


def _prompt_span(row: Row) -> _PromptSpan | None:
    """The prompt tokens that a row's logits predict and that were not reported yet."""
    sequence, num_tokens = row
    start = max(sequence.reported_prompt, sequence.computed + 1)
    end = min(sequence.prompt_count, sequence.computed + num_tokens + 1)
    return _PromptSpan(sequence, start, end - start) if start < end else None


def _report(spans: list[_PromptSpan], logits: torch.Tensor) -> list[PromptReport]:
    reports = []
    offset = 0
    for sequence, start, count in spans:
        tokens = sequence.tokens[start : start + count]
        top = sequence.sampling.prompt_logprobs
        reports.append(
            PromptReport(sequence, start, token_logprobs(logits[offset : offset + count], tokens, top))
        )
        sequence.reported_prompt = start + count
        offset += count
    return reports
