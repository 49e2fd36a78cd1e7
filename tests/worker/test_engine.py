"""The engine over a tiny real model: what it generates depends on the request alone."""

import random

import pytest
import torch

from sfllm.messages import Sampling
from sfllm_worker.engine.engine import Engine
from sfllm_worker.engine.planner import Limits
from sfllm_worker.engine.sequence import Sequence
from sfllm_worker.graphs.runner import EagerRunner
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load import LoadedModel, load_model
from sfllm_worker.model.attention import AttentionBatch

MAX_MODEL_LEN = 96


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("tiny-llama", dtype="float32", load_format="dummy")


def engine(model: LoadedModel, blocks: int = 64, **limits: int) -> Engine:
    chosen = Limits(max_sequences=8, max_step_tokens=32, block_size=8)._replace(**limits)
    kv = KVCache(model.config, blocks + 1, chosen.block_size, model.dtype)
    cpu = torch.device("cpu")
    return Engine(EagerRunner(model.decoder, kv), kv, chosen, model.eos_token_ids, MAX_MODEL_LEN, cpu)


def prompt(seed: int, length: int, model: LoadedModel) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(model.config.vocab_size) for _ in range(length)]


def sequence(key: int, tokens: list[int], **fields: object) -> Sequence:
    sampling = Sampling(**{"max_tokens": 20, "seed": key, "temperature": 0.9, "ignore_eos": True, **fields})
    return Sequence(key, 0, list(tokens), len(tokens), sampling)


def run(e: Engine, *sequences: Sequence) -> dict[tuple[object, int], list[int]]:
    """Run to the end; the output tokens of every choice."""
    for s in sequences:
        e.add(s)
    output: dict[tuple[object, int], list[int]] = {}
    steps = 0
    while e.has_work:
        for progress in e.step().progress:
            tokens = output.setdefault((progress.sequence.key, progress.sequence.choice), [])
            if progress.token is not None:
                tokens.append(progress.token)
        e.planner.check_integrity()
        steps += 1
        assert steps < 5000, "the engine makes no progress"
    return output


def test_the_same_seed_gives_the_same_tokens_alone_and_in_any_batch(model: LoadedModel) -> None:
    make = [
        lambda i=i: sequence(i, prompt(i, 3 + 7 * i, model), temperature=[0.0, 0.7, 1.3][i % 3])
        for i in range(8)
    ]
    together = run(engine(model), *(f() for f in make))
    alone: dict[tuple[object, int], list[int]] = {}
    for f in make:
        alone |= run(engine(model, max_step_tokens=64), f())
    assert together == alone


def test_preempted_sequences_end_with_the_same_tokens(model: LoadedModel) -> None:
    make = [lambda i=i: sequence(i, prompt(i, 20, model)) for i in range(4)]
    roomy = run(engine(model), *(f() for f in make))
    e = engine(model, blocks=14)
    preempted = 0
    for f in make:
        e.add(f())
    output: dict[tuple[object, int], list[int]] = {}
    while e.has_work:
        result = e.step()
        preempted += result.preempted
        for progress in result.progress:
            output.setdefault((progress.sequence.key, 0), []).append(progress.token)
    assert preempted > 0, "the cache was meant to be too small"
    assert output == roomy


def test_a_sequence_resumed_from_its_tokens_goes_on_as_it_would_have(model: LoadedModel) -> None:
    start = prompt(1, 17, model)
    whole = run(engine(model), sequence(5, start))[5, 0]
    for cut in (1, 7, 19):
        resumed = sequence(5, start + whole[:cut])
        resumed.prompt_count = len(start)
        assert run(engine(model), resumed)[5, 0] == whole[cut:]


def test_forked_choices_equal_separate_sequences_of_the_same_choice_index(model: LoadedModel) -> None:
    start = prompt(2, 21, model)
    leader = sequence(3, start)
    leader.fork_choices = (1, 2)
    forked = run(engine(model), leader)
    for choice in (0, 1, 2):
        single = sequence(3, start)
        single.choice = choice
        assert run(engine(model), single)[3, choice] == forked[3, choice]
    assert len({tuple(tokens) for tokens in forked.values()}) == 3, "choices draw different numbers"


def test_a_stop_token_ends_the_sequence_and_is_not_part_of_it(model: LoadedModel) -> None:
    start = prompt(4, 9, model)
    free = run(engine(model), sequence(1, start, temperature=0.0))[1, 0]
    stop = next(token for token in free[3:] if free.index(token) >= 3)
    cut = free.index(stop)
    e = engine(model)
    e.add(sequence(1, start, temperature=0.0, stop_token_ids=(stop,)))
    progress = []
    while e.has_work:
        progress += e.step().progress
    assert [p.token for p in progress] == [*free[:cut], None]
    assert progress[-1].finish == "stop"
    assert progress[-1].stop_token_id == stop


def test_min_tokens_keeps_a_stop_token_from_being_chosen(model: LoadedModel) -> None:
    start = prompt(4, 9, model)
    first = run(engine(model), sequence(1, start, temperature=0.0))[1, 0][0]
    output = run(engine(model), sequence(1, start, temperature=0.0, stop_token_ids=(first,), min_tokens=4))[
        1, 0
    ]
    assert len(output) >= 4
    assert first not in output[:4]


def test_a_sequence_ends_at_max_tokens_or_at_the_end_of_the_context(model: LoadedModel) -> None:
    assert len(run(engine(model), sequence(1, prompt(1, 5, model), max_tokens=7))[1, 0]) == 7
    near_the_end = prompt(1, MAX_MODEL_LEN - 3, model)
    assert len(run(engine(model), sequence(2, near_the_end))[2, 0]) == 3


def test_a_prompt_that_leaves_no_room_is_refused(model: LoadedModel) -> None:
    for length in (0, MAX_MODEL_LEN):
        with pytest.raises(ValueError, match="do not fit"):
            engine(model).add(sequence(1, prompt(1, length, model)))


def test_cancelled_sequences_give_all_blocks_back(model: LoadedModel) -> None:
    e = engine(model)
    sequences = [sequence(i, prompt(i, 30, model)) for i in range(12)]
    for s in sequences:
        e.add(s)
    for s in sequences:
        if e.has_work:
            e.step()
        if s in e.planner.running or s in e.planner.waiting:
            e.cancel(s)
    assert e.free_kv_tokens == e.kv_tokens
    e.planner.check_integrity()


def test_a_row_that_is_not_finite_faults_alone_and_leaves_a_clean_cache(model: LoadedModel) -> None:
    e = engine(model)
    sick, well = sequence(1, prompt(1, 12, model)), sequence(2, prompt(2, 12, model))
    expected = run(engine(model), sequence(2, prompt(2, 12, model)))
    e.add(sick)
    e.add(well)
    output = [p.token for p in e.step().progress if p.sequence is well]
    e._kv.layers[0].k[sick.block_table[0]] = torch.nan
    faults = []
    while e.has_work:
        for p in e.step().progress:
            if p.finish == "fault":
                faults.append(p.sequence)
            elif p.sequence is well:
                output.append(p.token)
    assert faults == [sick]
    assert output == expected[2, 0]
    assert not torch.isnan(e._kv.layers[0].k).any()


def test_log_probabilities_are_those_of_the_models_logits(model: LoadedModel) -> None:
    start = prompt(7, 30, model)
    e = engine(model)
    e.add(sequence(1, start, temperature=0.0, logprobs=3, prompt_logprobs=1, max_tokens=5))
    progress, reports = [], []
    while e.has_work:
        result = e.step()
        progress += result.progress
        reports += result.prompt_reports
    tokens = start + [p.token for p in progress]
    expected = whole_logprobs(model, tokens)
    for p, position in zip(progress, range(len(start), len(tokens)), strict=True):
        assert p.logprobs.width == 4
        assert p.logprobs.ids[0] == p.token
        assert p.logprobs.values == pytest.approx(expected[position - 1, p.logprobs.ids].tolist(), abs=1e-4)
        assert sorted(p.logprobs.values[1:], reverse=True) == list(p.logprobs.values[1:])
    reported = {}
    for report in reports:
        for index in range(len(report.logprobs.ids) // 2):
            entry = (report.logprobs.ids[2 * index], report.logprobs.values[2 * index])
            reported[report.start + index] = entry
    assert list(reported) == list(range(1, len(start))), "every prompt token but the first, once and in order"
    for position, (token, value) in reported.items():
        assert token == start[position]
        assert value == pytest.approx(float(expected[position - 1, token]), abs=1e-4)


def whole_logprobs(model: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """Log probabilities after every token, from one prefill of all of them."""
    kv = KVCache(model.config, 20, 8, model.dtype)
    length = len(tokens)
    batch = AttentionBatch.build([length], [length], [list(range(1, 20))], 8)
    with torch.inference_mode():
        hidden = model.decoder.forward(torch.tensor(tokens), batch.positions, batch, kv)
        return torch.log_softmax(model.decoder.logits(hidden), -1)


def test_the_prompt_of_a_sequence_that_ends_in_the_same_step_is_reported(model: LoadedModel) -> None:
    e = engine(model)
    e.add(sequence(1, prompt(7, 12, model), prompt_logprobs=0, max_tokens=1))
    result = e.step()
    assert [progress.finish for progress in result.progress] == ["length"]
    assert [(report.start, len(report.logprobs.ids)) for report in result.prompt_reports] == [(1, 11)]


def test_a_prefix_hit_changes_nothing_but_the_work(model: LoadedModel) -> None:
    start = prompt(8, 41, model)
    cold = run(engine(model), sequence(1, start))[1, 0]
    e = engine(model)
    run(e, sequence(2, start[:25]))
    warm = sequence(1, start)
    assert run(e, warm)[1, 0] == cold
    assert warm.cached_tokens == 24
    again = sequence(1, start)
    assert run(e, again)[1, 0] == cold
    assert again.cached_tokens == 40


def test_requests_of_one_prefix_that_arrive_together_compute_it_once(model: LoadedModel) -> None:
    shared = prompt(9, 40, model)
    make = [lambda i=i: sequence(i, shared + prompt(i, 5, model), max_tokens=6) for i in range(5)]
    alone: dict[tuple[object, int], list[int]] = {}
    for f in make:
        alone |= run(engine(model), f())
    e = engine(model)
    sequences = [f() for f in make]
    assert run(e, *sequences) == alone
    assert [s.cached_tokens for s in sequences] == [0, 40, 40, 40, 40]


def test_a_ban_shapes_one_row_and_not_its_neighbours(model: LoadedModel) -> None:
    start = prompt(3, 11, model)
    plain = run(engine(model), sequence(1, start, temperature=0.0))[1, 0]
    banned = tuple((token,) for token in set(plain))
    both = run(
        engine(model),
        sequence(1, start, temperature=0.0),
        sequence(2, prompt(3, 12, model), temperature=0.0, bad_words=banned),
    )
    assert both[1, 0] == plain
    assert not set(both[2, 0]) & set(plain)
