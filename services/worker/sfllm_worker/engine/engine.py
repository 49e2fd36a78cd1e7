"""The engine: sequences in, tokens out, one step at a time.

A step is planned (`planner.py`), its inputs are laid out, the model runs, tokens are
sampled and the sequences advance. The engine knows nothing of sockets, clocks or HTTP.

On a GPU a launch returns before its work is done. With `overlap` the next step is launched before the
tokens of the one before are read, as if every sequence went on: the device feeds the tokens from step to
step. The row of a sequence that turns out to have ended is dropped when it is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from math import isfinite

import torch

from sfllm.token_batch import Logprobs
from sfllm_worker.engine.compiling import Compiling
from sfllm_worker.engine.in_flight import StepInFlight, lay_out, token_ids_of
from sfllm_worker.engine.interface import Progress, PromptReport, StepResult
from sfllm_worker.engine.pending import SynchronousSampler, TokenSampler
from sfllm_worker.engine.planned import PlannedEngine, PromptSpan, prompt_spans, shape_of
from sfllm_worker.engine.planner import Limits, StepPlan
from sfllm_worker.engine.pooling import Pooler, pooled_rows
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.graphs.figures import GraphFigures
from sfllm_worker.graphs.runner import GraphRunner
from sfllm_worker.graphs.staging import Staging
from sfllm_worker.kv.ahead import MemoryAhead
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.logprobs import token_logprobs
from sfllm_worker.structured.figures import GrammarFigures
from sfllm_worker.structured.grammars import Grammars

LONGEST_WAIT_SECONDS = 0.01
"""For a grammar, while there is nothing else to do: whoever runs the steps has messages to read."""


class Engine(PlannedEngine):
    """Owner of the KV cache, the runner and the sampler, which compute what the planner plans.

    Invariants: at most one step is in flight between calls, two within one, and none without `overlap`;
    they are read in the order of their launch. Nothing waits for the device but reading a step's tokens,
    and launching one with log probabilities of prompt tokens.
    """

    def __init__(
        self,
        runner: GraphRunner,
        kv: KVCache,
        limits: Limits,
        eos_token_ids: Seq[int],
        max_model_len: int,
        device: torch.device,
        sampler: TokenSampler | None = None,
        overlap: bool = False,
        grammars: Grammars | None = None,
        memory_ahead: MemoryAhead | None = None,
    ) -> None:
        super().__init__(limits, kv.num_blocks, eos_token_ids, max_model_len)
        self._runner = runner
        self._kv = kv
        self._sampler: TokenSampler = sampler or SynchronousSampler()
        self._staging = Staging(device)
        self._memory_ahead = memory_ahead
        self._pooler = Pooler()
        self._grammars = grammars
        self._compiling = None if grammars is None else Compiling(grammars)
        self._in_flight: deque[StepInFlight] = deque()
        self._depth = 2 if overlap else 1
        self._drains = False

    @property
    def figures(self) -> GraphFigures:
        """What the runner has done so far."""
        return self._runner.figures

    @torch.inference_mode()
    def step(self) -> StepResult:
        """Launch steps over whatever can run, read the oldest one and say what came of it.

        Who was admitted or preempted is said of the steps that were launched.
        """
        refused = self._take_compiled()
        admitted: list[Sequence] = []
        preempted = 0
        while len(self._in_flight) < self._depth and not self._drains:
            plan = self.planner.plan()
            admitted += plan.admitted
            preempted += len(plan.preempted)
            self._drains = plan.lacks_blocks
            if not plan.rows:
                break
            self._in_flight.append(self._launch(plan))
        if not self._in_flight:
            return StepResult(refused, [], admitted, preempted, 0)
        oldest = self._in_flight.popleft()
        self._drains = self._drains and bool(self._in_flight)
        reports = [report for report in oldest.reports if report.sequence.block_table]  # not cancelled since
        progress = refused + self._read(oldest)
        return StepResult(
            progress, reports, admitted, preempted, oldest.num_tokens, shape=shape_of(oldest.plan)
        )

    def idle(self) -> bool:
        """Let the runner prepare something, or blocks get their memory; see `EngineInterface`."""
        if super().idle() or self._runner.idle():
            return True
        return self._memory_ahead is not None and self._memory_ahead.advance(self.planner.pool.ever_used + 1)

    @property
    def follows_grammars(self) -> bool:
        """Whether it can compile them."""
        return self._compiling is not None

    @property
    def grammar_figures(self) -> GrammarFigures | None:
        """What it has compiled, None if it cannot."""
        return None if self._grammars is None else self._grammars.figures

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence to advance or to make ready, or a step whose result nobody has seen."""
        return super().has_work or bool(self._compiling)

    @property
    def num_waiting(self) -> int:
        """Sequences that were added, or preempted, and wait for room or for their grammar."""
        return super().num_waiting + len(self._compiling or ())

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence. Its blocks are free when no step that was launched can touch them."""
        if self._compiling is None or not self._compiling.remove(sequence):
            super().cancel(sequence)

    def close(self) -> None:
        """Compile nothing more."""
        if self._grammars is not None:
            self._grammars.close()

    def _enqueue(self, sequence: Sequence) -> None:
        if sequence.sampling.grammar and self._compiling is not None:
            self._compiling.add(sequence)
        else:
            super()._enqueue(sequence)

    def _take_compiled(self) -> list[Progress]:
        """Let sequences whose grammar is ready run, and end those that cannot have one."""
        if not self._compiling:
            return []
        if not self.planner.has_work:
            self._compiling.wait(LONGEST_WAIT_SECONDS)
        compiled = self._compiling.take()
        for sequence in compiled.ready:
            self.planner.add(sequence)
        return [
            Progress(sequence, None, "refused", problem=problem) for sequence, problem in compiled.refused
        ]

    def _launch(self, plan: StepPlan) -> StepInFlight:
        if plan.copies:
            self._kv.copy_blocks(plan.copies)
        before = self._in_flight[-1] if self._in_flight else None
        token_ids = token_ids_of(plan, before, self._staging)
        spans = prompt_spans(plan)
        rows: list[SamplingRow] = []
        wanted: list[int] = []
        first_rows: dict[Sequence, int] = {}
        branches: dict[Sequence, tuple[int, ...]] = {}
        end = 0
        for sequence, num_tokens, _, completes in plan.rows:
            end += num_tokens
            if completes and sequence.sampling.pooling:
                sequence.unread += 1
            elif completes:
                first_rows[sequence] = len(rows)
                rows.append(self._sampling_row(sequence))
                wanted.append(end - 1)
                if sequence.fork_choices:
                    branches[sequence] = (sequence.choice, *sequence.fork_choices)
                    rows += [rows[-1]._replace(choice=choice) for choice in sequence.fork_choices]
                    wanted += [end - 1] * len(sequence.fork_choices)
                sequence.unread += 1
        inputs = lay_out(plan, token_ids, wanted, spans, self.planner.limits.block_size)
        embeddings: dict[Sequence, torch.Tensor] = {}
        if pooled := pooled_rows(plan):
            inputs = inputs._replace(
                on_hidden=lambda hidden: embeddings.update(self._pooler.take(pooled, hidden))
            )
        logits = self._runner.run(inputs)
        self.planner.launch(plan)
        reports = _report(spans, logits[len(rows) :]) if spans else []
        sample = self._sampler.launch(logits[: len(rows)] if spans else logits, rows)
        return StepInFlight(plan, end, first_rows, branches, sample, len(rows), reports, embeddings)

    def _sampling_row(self, sequence: Sequence) -> SamplingRow:
        sampling = sequence.sampling
        banned = self._banned(sequence) if sampling.min_tokens or sequence.constraint else ()
        return SamplingRow(
            *(sampling, sequence.choice, sequence.tokens, sequence.prompt_count, banned, sequence.unread),
            constraint=sequence.constraint,
        )

    def _read(self, step: StepInFlight) -> list[Progress]:
        """Wait for a step's tokens, and advance the sequences that still run."""
        tokens, sound, logprobs = step.sample.read()
        self.planner.settle(step.plan)
        progress = []
        for sequence, row in step.first_rows.items():
            if not sequence.block_table:
                continue  # it ended, or was cancelled, while the step was in flight
            sequence.unread -= 1
            if sequence not in step.branches:
                progress.append(self._take(sequence, tokens[row], sound[row], logprobs[row]))
                continue
            for branch in self._branches(sequence):
                own = step.row_of(sequence, branch.choice)
                progress.append(self._take(branch, tokens[own], sound[own], logprobs[own]))
        for sequence, embedding in step.embeddings.items():
            if sequence.block_table:
                progress.append(self._end_with(sequence, embedding.tolist()))
        return progress

    def _end_with(self, sequence: Sequence, embedding: list[float]) -> Progress:
        """The prompt's embedding is all that was wanted."""
        sequence.unread -= 1
        if not all(map(isfinite, embedding)):
            return self._fail(sequence)
        self.planner.remove(sequence)
        return Progress(sequence, None, "stop", embedding=embedding)

    def _take(self, sequence: Sequence, token: int, sound: bool, logprobs: Logprobs) -> Progress:
        if sound:
            return self._advance_by(sequence, token, logprobs)
        return self._fail(sequence)

    def _fail(self, sequence: Sequence) -> Progress:
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
