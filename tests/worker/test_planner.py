import itertools

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sfllm.messages import Sampling
from sfllm_worker.engine.planner import MOST_REPORTED, Limits, Planner
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.kv.block_pool import BlockPool

LIMITS = Limits(max_sequences=4, max_step_tokens=8, block_size=4)
SAMPLING = Sampling(max_tokens=100, seed=0)


NEXT_TOKEN = itertools.count()


def sequence(tokens: int, fork_choices: tuple[int, ...] = (), content: list[int] | None = None) -> Sequence:
    """A sequence whose tokens nobody else has, unless `content` is given."""
    content = content or [next(NEXT_TOKEN) for _ in range(tokens)]
    return Sequence("r", 0, content[:tokens], tokens, SAMPLING, fork_choices)


def planner(blocks: int = 16, **limits: int) -> Planner:
    return Planner(LIMITS._replace(**limits), BlockPool(blocks + 1))


def run(p: Planner) -> dict[int, int]:
    """Do what the engine does with a plan; how many tokens each sequence computed."""
    plan = p.plan()
    completed = [row.sequence for row in plan.rows if row.completes]
    p.launch(plan)
    p.settle(plan)
    for parent in completed:
        for branch in [parent, *(p.fork(parent, choice) for choice in parent.fork_choices)]:
            branch.tokens.append(next(NEXT_TOKEN))
    return {id(row.sequence): row.num_tokens for row in plan.rows}


def test_a_long_prompt_is_prefilled_in_chunks_of_the_budget() -> None:
    p = planner()
    s = sequence(20)
    p.add(s)
    assert [run(p)[id(s)] for _ in range(4)] == [8, 8, 4, 1]


def test_tokens_whose_log_probabilities_are_wanted_are_few_in_a_step_and_others_fill_it() -> None:
    p = planner(blocks=600, max_step_tokens=4 * MOST_REPORTED)
    wanted = [sequence(MOST_REPORTED // 2 * 3) for _ in range(2)]
    for s in wanted:
        s.sampling = msgspec.structs.replace(SAMPLING, prompt_logprobs=0)
    plain = sequence(2 * MOST_REPORTED)
    for s in (*wanted, plain):
        p.add(s)
    steps = [run(p) for _ in range(3)]
    half = MOST_REPORTED // 2
    reported = [[step.get(id(s), 0) for s in wanted] for step in steps]
    assert reported == [[2 * half, 0], [half, half], [1, 2 * half]]
    assert steps[0][id(plain)] == 2 * MOST_REPORTED


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


def test_a_prompt_that_was_computed_before_is_found_again_but_for_its_last_token() -> None:
    p = planner()
    content = [next(NEXT_TOKEN) for _ in range(8)]
    first = sequence(8, content=content)
    p.add(first)
    run(p)
    p.remove(first)
    again = sequence(8, content=content)
    p.add(again)
    assert run(p) == {id(again): 4}, "one block of two: the last token must be computed"
    assert again.cached_tokens == 4
    longer = sequence(10, content=[*content, 90001, 90002])
    p.add(longer)
    assert run(p)[id(longer)] == 2
    assert longer.cached_tokens == 8


def test_different_salts_share_nothing() -> None:
    p = planner()
    content = [next(NEXT_TOKEN) for _ in range(9)]
    p.add(sequence(9, content=content))
    run(p)
    other = sequence(9, content=content)
    other.cache_salt = "b"
    p.add(other)
    run(p)
    assert other.cached_tokens == 0


def test_a_follower_waits_for_the_leader_of_its_prefix_and_then_shares_its_blocks() -> None:
    p = planner(blocks=32)
    content = [next(NEXT_TOKEN) for _ in range(20)]
    leader, follower = sequence(20, content=content), sequence(20, content=content)
    bystander = sequence(3)
    for s in (leader, follower, bystander):
        p.add(s)
    run(p)
    assert follower in p.waiting, "its blocks are being computed"
    while follower in p.waiting:
        run(p)
    assert follower.cached_tokens == 16
    assert follower.block_table[:4] == leader.block_table[:4]
    run(p)
    assert bystander in p.running


def test_a_follower_goes_on_by_itself_when_its_leader_is_cancelled() -> None:
    p = planner(blocks=32)
    content = [next(NEXT_TOKEN) for _ in range(20)]
    leader, follower = sequence(20, content=content), sequence(20, content=content)
    p.add(leader)
    p.add(follower)
    run(p)
    p.remove(leader)
    run(p)
    assert follower in p.running
    assert follower.cached_tokens == 8, "what the leader had computed is kept"


def test_a_cached_prefix_is_given_up_when_its_blocks_are_needed_oldest_first() -> None:
    p = planner(blocks=4)
    contents = [[next(NEXT_TOKEN) for _ in range(5)] for _ in range(3)]
    for content in contents:
        s = sequence(5, content=content)
        p.add(s)
        run(p)
        p.remove(s)
    hits = []
    for content in reversed(contents):
        s = sequence(5, content=content)
        p.add(s)
        run(p)
        hits.append(s.cached_tokens)
        p.remove(s)
    assert hits[0] == 4, "the one used last is still there"
    assert p.pool.num_free == 4


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_whole() -> None:
    p = planner()
    content = [next(NEXT_TOKEN) for _ in range(9)]
    p.add(sequence(9, content=content))
    run(p)
    s = sequence(9, content=content)
    s.sampling = Sampling(max_tokens=1, seed=0, prompt_logprobs=0)
    p.add(s)
    run(p)
    assert s.cached_tokens == 0


class RandomTraffic(RuleBasedStateMachine):
    """Arrivals, steps, cancels and ends in any order, with a cache that is often too small."""

    def __init__(self) -> None:
        super().__init__()
        self.planner = planner(blocks=9)
        self.live: list[Sequence] = []

    @rule(tokens=st.integers(1, 30), forks=st.integers(0, 3), shared=st.booleans())
    def arrive(self, tokens: int, forks: int, shared: bool) -> None:
        content = list(range(10**6, 10**6 + 30)) if shared else None
        s = sequence(tokens, tuple(range(1, forks + 1)), content)
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
