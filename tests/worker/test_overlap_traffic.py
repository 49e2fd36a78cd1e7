"""Random traffic: an engine that launches a step ahead says what one does that reads each step first."""

from __future__ import annotations

from typing import NamedTuple

from fake_device import FakeDevice
from fake_model import VOCAB_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from overlap import Output, finish, overlapped_engine, plain_engine, sequence

from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.sequence import Sequence


class Arrive(NamedTuple):
    shared: int
    own: list[int]
    forks: int
    sampling: dict[str, object]

    def make(self, key: int) -> Sequence:
        return sequence(key, [*range(self.shared), *self.own], self.forks, **self.sampling)


class Cancel(NamedTuple):
    """Cancel a choice of those that are live: sequences, or one that has not branched off."""

    which: int
    whole: bool


class Step(NamedTuple):
    """`work` pieces of work finish on the device before the engine steps."""

    work: int


Event = Arrive | Cancel | Step

TOKENS = st.integers(0, VOCAB_SIZE - 1)
SAMPLING = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 25), "temperature": st.sampled_from([0.0, 0.8])},
    optional={
        "ignore_eos": st.booleans(),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.just((3, 30)),
        "repetition_penalty": st.just(1.5),
        "frequency_penalty": st.just(0.5),
        "bad_words": st.just(((5, 6), (9,))),
        "logprobs": st.integers(-1, 2),
        "prompt_logprobs": st.integers(-1, 1),
        "top_k": st.just(3),
    },
)
ARRIVE = st.builds(
    Arrive, st.integers(0, 20), st.lists(TOKENS, min_size=1, max_size=8), st.integers(0, 3), SAMPLING
)
EVENTS = st.lists(
    ARRIVE | st.builds(Cancel, st.integers(0, 30), st.booleans()) | st.builds(Step, st.integers(0, 8)),
    min_size=3,
    max_size=40,
)


def cancel(engine: Engine, event: Cancel) -> None:
    """What the ledger does with a cancel."""
    planner = engine.planner
    live = [*planner.running, *planner.waiting]
    if not live:
        return
    victim = live[event.which % len(live)]
    if event.whole:
        engine.cancel(victim)
    elif victim.fork_choices:
        heir = victim.fork_choices[0]
        engine.cancel_fork(victim, heir)
        if event.which % 2:
            victim.choice = heir  # the leading choice is cancelled: another takes its place


def overlapped(events: list[Event], blocks: int, faults: bool) -> Output:
    device = FakeDevice()
    engine = overlapped_engine(device, blocks, faults)
    output = Output()
    for key, event in enumerate(events):
        match event:
            case Arrive():
                engine.add(event.make(key))
            case Cancel():
                cancel(engine, event)
            case Step(work):
                device.run(work)
                output.take(engine.step())
        engine.check_integrity()
    return finish(engine, output)


@settings(max_examples=120, deadline=None)
@given(EVENTS, st.integers(11, 20), st.booleans())
def test_tokens_ends_and_log_probabilities_are_those_of_steps_read_one_by_one(
    events: list[Event], blocks: int, faults: bool
) -> None:
    output = overlapped(events, blocks, faults)
    engine = plain_engine(blocks, faults)
    for key, event in enumerate(events):
        if isinstance(event, Arrive):
            engine.add(event.make(key))
    expected = finish(engine)
    cancelled = any(isinstance(event, Cancel) for event in events)
    assert cancelled or output.ends.keys() == expected.ends.keys()
    for choice, tokens in output.tokens.items():
        assert tokens == expected.tokens[choice][: len(tokens)]
        assert output.ends.get(choice) in {None, expected.ends[choice]}
        assert choice not in output.ends or tokens == expected.tokens[choice]
        known = output.logprobs.get(choice, [])
        assert known == expected.logprobs.get(choice, [])[: len(known)]
    for key, reports in output.prompt_logprobs.items():
        assert all(expected.prompt_logprobs[key][position] == entry for position, entry in reports.items())
        assert cancelled or reports == expected.prompt_logprobs[key]
