from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sfllm.messages import Sampling
from sfllm_worker.engine.planner import Limits, Planner
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.kv.block_pool import BlockPool

LIMITS = Limits(max_sequences=4, max_step_tokens=8, block_size=4)
SAMPLING = Sampling(max_tokens=100, seed=0)


def sequence(tokens: int, fork_choices: tuple[int, ...] = ()) -> Sequence:
    return Sequence("r", 0, [1] * tokens, tokens, SAMPLING, fork_choices)


def planner(blocks: int = 16, **limits: int) -> Planner:
    return Planner(LIMITS._replace(**limits), BlockPool(blocks + 1))


def run(p: Planner) -> dict[int, int]:
    """Do what the engine does with a plan; how many tokens each sequence computed."""
    plan = p.plan()
    done = {}
    for row in plan.rows:
        completes = row.completes
        row.sequence.computed += row.num_tokens
        done[id(row.sequence)] = row.num_tokens
        if completes:
            branches = [row.sequence, *(p.fork(row.sequence, c) for c in row.sequence.fork_choices)]
            for branch in branches:
                branch.tokens.append(2)
    return done


def test_a_long_prompt_is_prefilled_in_chunks_of_the_budget() -> None:
    p = planner()
    s = sequence(20)
    p.add(s)
    assert [run(p)[id(s)] for _ in range(4)] == [8, 8, 4, 1]


def test_decodes_go_on_while_another_prompt_is_prefilled() -> None:
    p = planner()
    first, second = sequence(3), sequence(20)
    p.add(first)
    run(p)
    p.add(second)
    assert run(p) == {id(first): 1, id(second): 7}
    assert [row.num_tokens for row in p.plan().rows] == [1, 7], "rows of one token come first"


def test_a_prompt_waits_until_its_blocks_are_free() -> None:
    p = planner(blocks=4)
    first, second = sequence(12), sequence(8)
    p.add(first)
    p.add(second)
    run(p)
    assert p.running == [first]
    assert list(p.waiting) == [second]
    p.remove(first)
    run(p)
    assert p.running == [second]


def test_the_youngest_is_preempted_when_a_decode_finds_no_block_and_is_computed_again() -> None:
    p = planner(blocks=4)
    old, young = sequence(7), sequence(8)
    p.add(old)
    run(p)
    p.add(young)
    run(p)
    while not p.waiting:
        run(p)
    assert list(p.waiting) == [young]
    assert young.computed == 0
    assert old in p.running
    p.remove(old)
    run(p)
    assert young in p.running


def test_forks_share_blocks_and_copy_the_last_one_before_they_write() -> None:
    p = planner()
    s = sequence(6, fork_choices=(1, 2))
    p.add(s)
    run(p)
    assert [branch.choice for branch in p.running] == [0, 1, 2]
    assert p.pool.num_blocks - p.pool.num_free == 2
    plan = p.plan()
    assert len(plan.copies) == 2, "two of three branches copy, the last keeps the original"
    tables = [tuple(branch.block_table) for branch in p.running]
    assert len({table[0] for table in tables}) == 1
    assert len({table[1] for table in tables}) == 3


def test_choices_to_come_count_as_running_sequences() -> None:
    p = planner()
    p.add(sequence(4, fork_choices=(1, 2, 3)))
    p.add(sequence(2))
    run(p)
    assert len(p.waiting) == 1


class RandomTraffic(RuleBasedStateMachine):
    """Arrivals, steps, cancels and ends in any order, with a cache that is often too small."""

    def __init__(self) -> None:
        super().__init__()
        self.planner = planner(blocks=9)
        self.live: list[Sequence] = []

    @rule(tokens=st.integers(1, 30), forks=st.integers(0, 3))
    def arrive(self, tokens: int, forks: int) -> None:
        s = sequence(tokens, tuple(range(1, forks + 1)))
        self.planner.add(s)
        self.live.append(s)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(self.live))
        self.planner.remove(victim)
        self.live.remove(victim)

    @precondition(lambda self: any(s.fork_choices for s in self.live))
    @rule(data=st.data())
    def cancel_a_choice_to_come(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from([s for s in self.live if s.fork_choices]))
        self.planner.drop_fork(parent, parent.fork_choices[0])

    @rule()
    def step(self) -> None:
        had_work = self.planner.has_work
        done = run(self.planner)
        assert bool(done) == had_work, "a step with work does something"
        assert sum(done.values()) <= LIMITS.max_step_tokens
        self.live += [s for s in self.planner.running if s not in self.live]
        for s in [s for s in self.live if len(s.tokens) >= 35]:
            self.planner.remove(s)
            self.live.remove(s)

    @invariant()
    def bookkeeping_is_sound(self) -> None:
        self.planner.check_integrity()
        assert sorted(map(id, self.live)) == sorted(map(id, [*self.planner.running, *self.planner.waiting]))


RandomTraffic.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestRandomTraffic = RandomTraffic.TestCase
