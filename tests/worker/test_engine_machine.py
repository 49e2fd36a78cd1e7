"""The whole engine on a fake model under random traffic.

The fake model's next token is a function of what is in the cache, so the output must be that
function of the sequence's tokens.
"""

from __future__ import annotations

from fake_model import LIMITS, MAX_MODEL_LEN, VOCAB_SIZE, fake_engine, next_token
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sfllm.messages import Sampling
from sfllm_worker.engine.sequence import Sequence


class RandomTraffic(RuleBasedStateMachine):
    """Arrivals with common beginnings, forks, cancels and steps, with too small a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = fake_engine()
        self.live: list[Sequence] = []
        self.steps_without_progress = 0

    @rule(
        shared=st.integers(0, 20),
        own=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8),
        max_tokens=st.integers(1, 25),
        forks=st.integers(0, 3),
        salt=st.sampled_from(["", "a"]),
        ignore_eos=st.booleans(),
    )
    def arrive(
        self, shared: int, own: list[int], max_tokens: int, forks: int, salt: str, ignore_eos: bool
    ) -> None:
        tokens = [*range(shared), *own]
        sampling = Sampling(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=ignore_eos)
        sequence = Sequence(
            "r", 0, tokens, len(tokens), sampling, tuple(range(1, forks + 1)), cache_salt=salt
        )
        self.engine.add(sequence)
        self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(self.live))
        self.engine.cancel(victim)
        self.live.remove(victim)

    @precondition(lambda self: any(s.fork_choices for s in self.live))
    @rule(data=st.data())
    def cancel_a_choice_to_come(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from([s for s in self.live if s.fork_choices]))
        self.engine.cancel_fork(parent, parent.fork_choices[0])

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            had_work = self.engine.has_work
            result = self.engine.step()
            assert bool(result.num_tokens) == had_work, "with work, a step computes something"
            assert result.num_tokens <= LIMITS.max_step_tokens
            for progress in result.progress:
                self.check(progress.sequence, progress.token, progress.finish, progress.stop_token_id)
            self.engine.planner.check_integrity()

    def check(self, sequence: Sequence, token: int | None, finish: str | None, stop: int) -> None:
        before = sequence.tokens if token is None else sequence.tokens[:-1]
        expected = next_token(before)
        assert expected == (stop if token is None else token), "the cache held something else"
        ends_the_text = expected == 7 and not sequence.sampling.ignore_eos
        assert (finish == "stop") == ends_the_text
        if sequence not in self.live:
            self.live.append(sequence)
        if finish is not None:
            self.live.remove(sequence)
        if finish == "length":
            full = len(sequence.tokens) == MAX_MODEL_LEN
            assert full or sequence.generated == sequence.sampling.max_tokens

    @invariant()
    def every_live_sequence_is_in_the_engine(self) -> None:
        planner = self.engine.planner
        assert sorted(map(id, self.live)) == sorted(map(id, [*planner.running, *planner.waiting]))

    def teardown(self) -> None:
        """Whatever is left comes to its end, and then every block is free."""
        for _ in range(2000):
            if not self.engine.has_work:
                break
            for progress in self.engine.step().progress:
                self.check(progress.sequence, progress.token, progress.finish, progress.stop_token_id)
        assert not self.engine.has_work, "the engine never comes to rest"
        assert self.engine.free_kv_tokens == self.engine.kv_tokens


RandomTraffic.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestRandomTraffic = RandomTraffic.TestCase
