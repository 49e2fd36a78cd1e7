"""The captured runner against the eager one, with a recorder whose replay reruns on the same buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rerun_recorder import RerunRecorder, make_decoder
from torch import Tensor

from sfllm_worker.graphs.buffers import StaticBuffers
from sfllm_worker.graphs.captured import CapturedRunner
from sfllm_worker.graphs.keys import GraphKey, GraphPlan, plan_graphs
from sfllm_worker.graphs.recorder import Recording
from sfllm_worker.graphs.runner import EagerRunner, GraphRunner, StepInputs
from sfllm_worker.kv.cache import PADDING_BLOCK, KVCache
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.model.decoder import Decoder

BLOCK = 4
SEQUENCES, LONGEST = 7, 40
PLAN = plan_graphs((1, 2, 4, 6), (8, 16, 32))
"""Seven sequences, or more than 32 tokens of one, do not fit: such steps run eagerly."""
CPU = torch.device("cpu")


def all_at_once(plan: GraphPlan) -> GraphPlan:
    return GraphPlan(plan.keys, ())


def captured_runner(
    decoder: Decoder, kv: KVCache, recorder: RerunRecorder, plan: GraphPlan = PLAN, **options: Any
) -> CapturedRunner:
    runner = CapturedRunner(decoder, kv, plan, recorder, **{"free_bytes": lambda: 0, **options})
    runner.capture_first()
    return runner


class Run:
    """Sequences with scattered blocks over a runner and a cache of its own."""

    def __init__(self, decoder: Decoder) -> None:
        blocks = (
            torch.randperm(SEQUENCES * LONGEST // BLOCK, generator=torch.Generator().manual_seed(1)) + 1
        ).tolist()
        each = LONGEST // BLOCK
        self.tables = [blocks[i * each : (i + 1) * each] for i in range(SEQUENCES)]
        self.kv = KVCache(decoder.config, len(blocks) + 1, BLOCK, torch.float32)
        # Where nothing was written, nothing may be read: what lies there would show.
        self.kv.storage[:, :, 1:] = 1e4
        self.lengths = [0] * SEQUENCES

    def inputs(self, work: list[tuple[int, int]]) -> StepInputs:
        """A step of `(sequence, number of tokens)`; logits are wanted of every row."""
        ids = []
        for sequence, count in work:
            ids += [(31 * sequence + 7 * (self.lengths[sequence] + i)) % 500 for i in range(count)]
            self.lengths[sequence] += count
        batch = AttentionBatch.build(
            [count for _, count in work],
            [self.lengths[sequence] for sequence, _ in work],
            [self.tables[sequence] for sequence, _ in work],
            BLOCK,
        )
        return StepInputs(torch.tensor(ids), batch, batch.last_rows.tolist())

    @torch.inference_mode()
    def step(self, runner: GraphRunner, work: list[tuple[int, int]]) -> torch.Tensor:
        return runner.run(self.inputs(work)).clone()


@st.composite
def schedules(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Steps as an engine plans them: prompts of any length, then decodes of whichever have one."""
    lengths = [0] * SEQUENCES
    steps = []
    for _ in range(draw(st.integers(1, 7))):
        chosen = draw(st.lists(st.integers(0, SEQUENCES - 1), min_size=1, unique=True))
        starting = draw(st.booleans())
        work = [
            (sequence, 1 if lengths[sequence] and not starting else draw(st.integers(1, 14)))
            for sequence in chosen
        ]
        work = sorted(
            (row for row in work if lengths[row[0]] + row[1] <= LONGEST), key=lambda row: row[1] > 1
        )
        for sequence, count in work:
            lengths[sequence] += count
        steps += [work] if work else []
    return steps


@given(schedules(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_sequence_of_steps_gives_what_eager_steps_give(
    plain: Decoder, windowed: Decoder, schedule: list[list[tuple[int, int]]], window: bool
) -> None:
    decoder = windowed if window else plain
    ours, theirs = Run(decoder), Run(decoder)
    runner = captured_runner(decoder, ours.kv, RerunRecorder(), all_at_once(PLAN))
    eager = EagerRunner(decoder, theirs.kv)
    for work in schedule:
        torch.testing.assert_close(ours.step(runner, work), theirs.step(eager, work), rtol=1e-4, atol=1e-5)
        # Padding rows write into the padding block and nowhere else.
        torch.testing.assert_close(
            ours.kv.storage[:, :, PADDING_BLOCK + 1 :], theirs.kv.storage[:, :, PADDING_BLOCK + 1 :]
        )


def test_a_step_replays_exactly_when_it_is_of_decodes_that_a_key_holds(
    plain: Decoder, recorder: RerunRecorder
) -> None:
    run = Run(plain)
    runner = captured_runner(plain, run.kv, recorder)
    kinds = []
    for work in (
        [(i, 5) for i in range(7)],  # prompts
        [(i, 1) for i in range(3)],
        [(i, 1) for i in range(7)],  # more rows than any bucket has
        [(0, 1), (1, 1), (2, 3)],  # decodes with a prompt's chunk
        [(0, 26)],
        [(0, 1), (1, 1)],  # a context longer than any band
        [(1, 1)],
    ):
        before = recorder.replays
        run.step(runner, work)
        kinds.append(recorder.replays - before)
    assert kinds == [0, 1, 0, 0, 0, 0, 1]
    figures = runner.figures
    assert (figures.replays, figures.eager_steps) == (2, 5)
    assert figures.padding_rows == 1


def test_decodes_run_eagerly_when_some_rows_want_no_logits(plain: Decoder, recorder: RerunRecorder) -> None:
    run = Run(plain)
    runner = captured_runner(plain, run.kv, recorder)
    inputs = run.inputs([(0, 1), (1, 1), (2, 1)])
    for wanted in ([2], [1, 0, 2], [0, 1, 2, 2], []):
        assert len(runner.run(inputs._replace(logit_rows=wanted))) == len(wanted)
    assert recorder.replays == 0


def test_nothing_of_a_longer_step_is_left_in_the_buffers() -> None:
    buffers = StaticBuffers(PLAN.keys, BLOCK, CPU)
    tables = [[9, 8, 7, 6, 5, 4, 3, 2]] * 6
    long = AttentionBatch.build([1] * 6, [32] * 6, tables, BLOCK)
    buffers.fill(GraphKey(6, 32), torch.full((6,), 99), long)
    short = AttentionBatch.build([1], [3], [[5]], BLOCK)
    for key in PLAN.keys:
        buffers.fill(key, torch.tensor([42]), short)
        inputs = buffers.inputs(key)
        padding = key.batch - 1
        assert inputs.token_ids.tolist() == [42] + [0] * padding
        assert inputs.batch.positions.tolist() == [2] + [0] * padding
        assert inputs.batch.slot_mapping.tolist() == [5 * BLOCK + 2] + [0] * padding
        assert inputs.batch.context_lens_tensor.tolist() == [3] + [1] * padding
        assert inputs.batch.last_rows.tolist() == list(range(key.batch))
        expected = torch.full((key.batch, key.context // BLOCK), PADDING_BLOCK)
        expected[0, 0] = 5
        assert inputs.batch.block_tables.equal(expected)


def test_a_key_keeps_its_addresses_and_starts_each_array_where_kernels_expect_it() -> None:
    buffers = StaticBuffers(PLAN.keys, BLOCK, CPU)
    for key in PLAN.keys:
        first, again = buffers.inputs(key), buffers.inputs(key)
        for name in ("block_tables", "context_lens_tensor", "slot_mapping", "positions", "last_rows"):
            address = getattr(first.batch, name).data_ptr()
            assert address == getattr(again.batch, name).data_ptr()
            assert (address - first.batch.last_rows.data_ptr()) % 128 == 0
        assert first.batch.context_lens == (key.context,) * key.batch


@pytest.mark.parametrize("window", [False, True])
def test_a_captured_step_never_asks_the_device_for_a_value(window: bool) -> None:
    # A tensor on "meta" has no values: whoever reads one fails.
    options = {"architectures": ["MistralForCausalLM"], "sliding_window": 5} if window else {}
    decoder = make_decoder("meta", **options)
    kv = KVCache(decoder.config, 8, BLOCK, torch.float32, "meta")
    inputs = StaticBuffers(PLAN.keys, BLOCK, torch.device("meta")).inputs(GraphKey(4, 16))
    with torch.inference_mode():
        hidden = decoder.forward(inputs.token_ids, inputs.batch.positions, inputs.batch, kv)
        assert decoder.logits(hidden).shape == (4, decoder.config.vocab_size)


def test_later_graphs_come_one_at_a_time_and_are_used_as_soon_as_they_are_there(
    plain: Decoder, recorder: RerunRecorder
) -> None:
    run = Run(plain)
    plan = GraphPlan((GraphKey(6, 32),), (GraphKey(3, 8), GraphKey(1, 8)))
    runner = captured_runner(plain, run.kv, recorder, plan)
    run.step(runner, [(0, 1), (1, 1), (2, 1)])
    assert runner.figures.padding_rows == 3
    assert runner.idle()
    assert recorder.captures == 2
    run.step(runner, [(0, 1), (1, 1), (2, 1)])
    assert runner.figures.padding_rows == 3
    assert not runner.idle()
    assert not runner.idle()
    assert recorder.captures == runner.figures.captured == 3


def test_a_capture_touches_no_block_of_a_sequence(plain: Decoder, recorder: RerunRecorder) -> None:
    run = Run(plain)
    before = run.kv.storage.clone()
    captured_runner(plain, run.kv, recorder, all_at_once(PLAN))
    assert run.kv.storage[:, :, 1:].equal(before[:, :, 1:])


def test_later_graphs_are_given_up_when_the_reserved_memory_is_used_up(
    plain: Decoder, recorder: RerunRecorder
) -> None:
    free = iter(range(1000, 0, -10))
    runner = captured_runner(
        plain,
        Run(plain).kv,
        recorder,
        GraphPlan((GraphKey(6, 32),), (*PLAN.later, GraphKey(1, 8), GraphKey(2, 8))),
        free_bytes=lambda: next(free),
        reserved_bytes=20,
    )
    assert runner.figures.memory_bytes == 10
    assert runner.idle()
    assert not runner.idle()
    assert recorder.captures == 2


def test_later_graphs_are_given_up_when_the_device_has_no_memory_for_one(plain: Decoder) -> None:
    class FullDevice(RerunRecorder):
        def capture(self, function: Callable[[], Tensor]) -> Recording:
            if self.captures:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().capture(function)

    later = (GraphKey(1, 8), GraphKey(2, 8))
    kv = KVCache(plain.config, 4, BLOCK, torch.float32)
    runner = CapturedRunner(plain, kv, GraphPlan((GraphKey(6, 32),), later), FullDevice(), lambda: 0)
    runner.capture_first()
    assert not runner.idle()
    assert not runner.idle()
    assert runner.figures.captured == 1
    steps = AttentionBatch.build([1], [1], [[1]], BLOCK)
    runner.run(StepInputs(torch.zeros(1, dtype=torch.int64), steps, [0]))
    assert runner.figures.replays == 1


def test_token_ids_that_are_on_the_device_are_not_read_by_the_host() -> None:
    meta = torch.device("meta")  # reading from it is an error
    buffers = StaticBuffers(PLAN.keys, BLOCK, meta)
    batch = AttentionBatch.build([1, 1], [3, 5], [[5], [1, 2]], BLOCK)
    buffers.fill(GraphKey(4, 16), torch.zeros(2, dtype=torch.int64, device=meta), batch)
    assert buffers.inputs(GraphKey(4, 16)).token_ids.device == meta
