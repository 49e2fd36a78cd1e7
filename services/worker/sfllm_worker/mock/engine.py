"""An engine that plans and accounts like the real one and computes nothing.

Batches, chunked prefill, the prefix cache, forks and preemption are the planner's, so that blocks run
out, are shared and are freed as with a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

from sfllm.token_batch import NO_LOGPROBS, Logprobs
from sfllm_worker.engine.interface import Progress, PromptReport, StepResult
from sfllm_worker.engine.planned import PlannedEngine, PromptSpan, prompt_spans, shape_of
from sfllm_worker.engine.planner import Limits, StepPlan
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.mock.tokens import EOS_TOKEN, TEXT_TOKENS, mock_logprobs, mock_token, prompt_digest


class Pace(NamedTuple):
    """How fast a mock worker is to look: tokens a second of each sequence, prompt tokens a second in all."""

    tokens_per_second: float = 50.0
    prefill_tokens_per_second: float = 20000.0


class Poison(NamedTuple):
    """`strike` is called when a step is about to compute a sequence with `token` in its prompt."""

    token: int
    strike: Callable[[], None]


class MockEngine(PlannedEngine):
    """Makes up the next token of every sequence (`tokens.py`); `step` says how long it should take.

    `output_tokens` is where each sequence ends that does not ignore it; `max_tokens` where it is None.
    """

    def __init__(
        self,
        limits: Limits,
        kv_tokens: int,
        max_model_len: int,
        pace: Pace = Pace(),  # noqa: B008 - immutable
        output_tokens: int | None = None,
        poison: Poison | None = None,
    ) -> None:
        blocks = max(1, -(-kv_tokens // limits.block_size))
        fitting = min(max_model_len, blocks * limits.block_size)
        super().__init__(limits, blocks + 1, (EOS_TOKEN,), fitting)
        self._pace = pace
        self._output_tokens = output_tokens
        self._poison = poison
        self._digests: WeakKeyDictionary[Sequence, bytes] = WeakKeyDictionary()

    def step(self) -> StepResult:
        """Run one step over whatever can run, and say what came of it and how long it should take."""
        plan = self.planner.plan()
        if self._poison is not None:
            self._strike_if_poisoned(plan, self._poison)
        targets = [row.sequence for row in plan.rows if row.completes]
        reports = [self._report(span) for span in prompt_spans(plan)]
        self.planner.launch(plan)
        self.planner.settle(plan)
        progress = [
            self._next(sequence, self._digest(target))
            for target in targets
            for sequence in self._branches(target)
        ]
        num_tokens = sum(row.num_tokens for row in plan.rows)
        preempted, seconds = len(plan.preempted), self._seconds(plan)
        return StepResult(progress, reports, plan.admitted, preempted, num_tokens, seconds, shape_of(plan))

    def longest_step_seconds(self) -> float:
        """How long a step may take at most."""
        limits = self.planner.limits
        return max(
            1 / self._pace.tokens_per_second, limits.max_step_tokens / self._pace.prefill_tokens_per_second
        )

    def _seconds(self, plan: StepPlan) -> float:
        """Decodes take as long as one of them; prefill takes its tokens; both at once the longer time."""
        prefill = sum(row.num_tokens for row in plan.rows if row.num_tokens > 1)
        decode = 1 / self._pace.tokens_per_second if any(row.num_tokens == 1 for row in plan.rows) else 0.0
        return max(decode, prefill / self._pace.prefill_tokens_per_second)

    def _next(self, sequence: Sequence, digest: bytes) -> Progress:
        self._digests[sequence] = digest  # a new branch has the prompt of its leader
        sampling, position = sequence.sampling, sequence.generated
        banned = self._banned(sequence)
        ends = self._output_tokens is not None and position >= self._output_tokens
        if ends and not sampling.ignore_eos and EOS_TOKEN not in banned:
            return self._advance_by(sequence, EOS_TOKEN, NO_LOGPROBS)
        candidates = sampling.allowed_token_ids or TEXT_TOKENS
        token = mock_token(sampling.seed, sequence.choice, position, digest, candidates, banned)
        return self._advance_by(sequence, token, self._logprobs(sequence, digest, token))

    def _logprobs(self, sequence: Sequence, digest: bytes, token: int) -> Logprobs:
        top = sequence.sampling.logprobs
        return mock_logprobs(digest, len(sequence.tokens), token, top) if top >= 0 else NO_LOGPROBS

    def _report(self, span: PromptSpan) -> PromptReport:
        sequence, start, count = span
        digest, top = self._digest(sequence), sequence.sampling.prompt_logprobs
        each = [
            mock_logprobs(digest, position, sequence.tokens[position], top)
            for position in range(start, start + count)
        ]
        sequence.reported_prompt = start + count
        ids = [token for logprobs in each for token in logprobs.ids]
        values = [value for logprobs in each for value in logprobs.values]
        return PromptReport(sequence, start, Logprobs(each[0].width, ids, values))

    def _digest(self, sequence: Sequence) -> bytes:
        """The digest of a sequence's prompt, which is computed once."""
        digest = self._digests.get(sequence)
        if digest is None:
            digest = prompt_digest(sequence.tokens[: sequence.prompt_count])
            self._digests[sequence] = digest
        return digest

    def _strike_if_poisoned(self, plan: StepPlan, poison: Poison) -> None:
        for row in plan.rows:
            if poison.token in row.sequence.tokens[: row.sequence.prompt_count]:
                poison.strike()
