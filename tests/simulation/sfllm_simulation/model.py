"""The model that the simulated workers serve, what its answers truly are, and the times of the links."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sfllm.messages import ModelCard, Sampling
from sfllm.token_batch import Logprobs
from sfllm_worker.engine.interface import Progress, StepResult
from sfllm_worker.engine.planner import Limits
from sfllm_worker.mock.engine import MockEngine
from sfllm_worker.mock.tokens import EOS_TOKEN, VOCAB_SIZE, mock_logprobs, mock_token, prompt_digest

from .script import Open

MODEL = "m"
MAX_MODEL_LEN = 192
BLOCK_TOKENS = 8
STEP_TOKENS = 32
BEAT_SECONDS = 1.0
LEASE_SECONDS = 3.0

STOP_TOKEN = ord(" ")
"""One token in 95 is a space, which ends an answer: some end by themselves, others at their length."""

CARD = ModelCard(MODEL, (), MODEL, 0, MAX_MODEL_LEN, VOCAB_SIZE, (EOS_TOKEN,), ())


class BrokenStep(Exception):  # noqa: N818 - it names what happened
    """What a step of a broken engine raises. `kills`: nothing of the process is left."""

    def __init__(self, kills: bool) -> None:
        super().__init__("the engine broke")
        self.kills = kills


class Ending(NamedTuple):
    """All tokens of a choice, and why there are no more."""

    tokens: list[int]
    reason: str


class Truth:
    """What the answer to a request is when nothing goes wrong, and must be when something does."""

    def __init__(self, asked: Open) -> None:
        self._asked = asked
        # Prompts share beginnings, so that the prefix cache has something to find.
        self.prompt = [97 + position % 7 for position in range(asked.prompt - 1)] + [asked.request % 90]
        self._digest = prompt_digest(self.prompt)
        self.choices = [self._ending(choice) for choice in range(asked.n)]

    @property
    def sampling(self) -> Sampling:
        """What to ask for to get this answer."""
        asked = self._asked
        return Sampling(
            max_tokens=asked.tokens,
            seed=asked.request,
            stop_token_ids=(STOP_TOKEN,),
            logprobs=asked.logprobs,
            prompt_logprobs=asked.logprobs if asked.logprobs > 0 else -1,
        )

    def logprobs(self, choice: int, position: int) -> Logprobs:
        """Of one token of the answer."""
        token = self.choices[choice].tokens[position]
        return mock_logprobs(self._digest, len(self.prompt) + position, token, self._asked.logprobs)

    def _ending(self, choice: int) -> Ending:
        tokens: list[int] = []
        while len(tokens) < self._asked.tokens:
            token = mock_token(self._asked.request, choice, len(tokens), self._digest)
            if token == STOP_TOKEN:
                return Ending(tokens, "stop")
            tokens.append(token)
        return Ending(tokens, "length")


class PoisonedEngine(MockEngine):
    """Breaks while it computes a certain token of certain requests.

    `poison` maps a request's seed to the number of that token and whether it kills the process.
    """

    def __init__(self, limits: Limits, kv_tokens: int, poison: Mapping[int, tuple[int, bool]]) -> None:
        super().__init__(limits, kv_tokens, MAX_MODEL_LEN)
        self.usable_kv_tokens = self.free_kv_tokens
        self._poisonous = poison

    def step(self) -> StepResult:
        """One step. Raises BrokenStep."""
        result = super().step()
        for progress in result.progress:
            deadly, kills = self._poisonous.get(progress.sequence.sampling.seed, (-1, False))
            if _position(progress) == deadly:
                raise BrokenStep(kills)
        return result


def _position(progress: Progress) -> int:
    """Which output token was just computed, or would have been if it were not the end."""
    return progress.sequence.generated - (progress.token is not None)


def make_engine(slots: int, kv_tokens: int, poison: Mapping[int, tuple[int, bool]]) -> PoisonedEngine:
    """An engine with room for so many sequences and tokens."""
    return PoisonedEngine(Limits(slots, max(STEP_TOKENS, slots), BLOCK_TOKENS), kv_tokens, poison)
