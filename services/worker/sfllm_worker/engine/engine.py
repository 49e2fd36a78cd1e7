"""The engine: sequences in, tokens out, one step at a time.

A step is planned (`planner.py`), its inputs are laid out, the model runs, tokens are
sampled and the sequences advance. The engine knows nothing of sockets, clocks or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import accumulate, starmap

import torch

from sfllm.token_batch import Logprobs
from sfllm_worker.engine.interface import Progress, PromptReport, StepResult
from sfllm_worker.engine.planned import PlannedEngine, PromptSpan, prompt_spans
from sfllm_worker.engine.planner import Limits, Row, StepPlan
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.graphs.runner import GraphRunner, StepInputs
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.logprobs import token_logprobs
from sfllm_worker.sampling.sampler import sample


class Engine(PlannedEngine):
    """Owner of the KV cache and the runner, which compute what the planner plans."""

    def __init__(
        self,
        runner: GraphRunner,
        kv: KVCache,
        limits: Limits,
        eos_token_ids: Seq[int],
        max_model_len: int,
        device: torch.device,
    ) -> None:
        super().__init__(limits, kv.num_blocks, eos_token_ids, max_model_len)
        self._runner = runner
        self._kv = kv
        self._device = device

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
        spans = prompt_spans(plan)
        inputs = self._inputs(plan, completed, spans)
        logits = self._runner.run(inputs)
        # Each completed sequence gets a token now or ends, so `computed` stays below its length.
        self.planner.commit(plan)
        reports = _report(spans, logits[len(targets) :])
        progress = self._advance(targets, logits[: len(targets)]) if targets else []
        return StepResult(progress, reports, plan.admitted, len(plan.preempted), len(inputs.token_ids))

    def _inputs(self, plan: StepPlan, completed: list[int], spans: list[PromptSpan]) -> StepInputs:
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
            branches = self._branches(row.sequence)
            sequences += branches
            logit_rows += [index] * len(branches)
        if len(sequences) > len(targets):
            logits = logits[logit_rows]
        sampled = sample(logits, [self._sampling_row(sequence) for sequence in sequences])
        return list(starmap(self._take, zip(sequences, *sampled, strict=True)))

    def _sampling_row(self, sequence: Sequence) -> SamplingRow:
        banned = self._banned(sequence)
        return SamplingRow(sequence.sampling, sequence.choice, sequence.tokens, sequence.prompt_count, banned)

    def _take(self, sequence: Sequence, token: int, sound: bool, logprobs: Logprobs) -> Progress:
        if sound:
            return self._advance_by(sequence, token, logprobs)
        # A NaN left in a free block would spoil the next sequence even where it is masked.
        self._kv.zero_blocks(self.planner.spoil(sequence))
        self.planner.remove(sequence)
        return Progress(sequence, None, "fault")


def _report(spans: list[PromptSpan], logits: torch.Tensor) -> list[PromptReport]:
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
