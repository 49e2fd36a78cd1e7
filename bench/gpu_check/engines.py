"""The engine on the device: graphs, overlap, no waiting in the steady state, batch invariance."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench.gpu_check.checks import Check, Setting
from bench.gpu_check.models import tokens_of_text
from model_references import make_reference, reference_greedy
from rerun_recorder import RerunRecorder

from sfllm.messages import Sampling
from sfllm.settings import WorkerSettings
from sfllm_worker.engine import sequence as sequences
from sfllm_worker.engine.engine import Engine
from sfllm_worker.graphs.captured import CapturedRunner
from sfllm_worker.graphs.keys import plan_graphs
from sfllm_worker.graphs.recorder import CudaRecorder
from sfllm_worker.graphs.runner import StepInputs
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load import load_model
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.model.decoder import TextModel
from sfllm_worker.startup import build

BLOCK = 16


def checks(setting: Setting) -> list[Check]:
    """What the parts around the kernels must do."""
    return [
        Check("engine float32: greedy texts of transformers", partial(engine_greedy, setting)),
        Check("graphs: replay equals eager launches with its padding", partial(replay_equal, setting)),
        Check("steady steps do not wait for the device", partial(no_waiting, setting), needs_gpu=True),
        Check("graphs and overlap change no token of a text", partial(same_tokens, setting), needs_gpu=True),
        Check("--deterministic: the same tokens in any batch", partial(any_batch, setting)),
    ]


def engine_greedy(setting: Setting) -> str:
    """Prompts that share steps, chunks and graphs, in float32 without TF32."""
    text, count = tokens_of_text(60), 24
    prompts = [text[:40], text[:7], text[20:23], text[5:30]]
    with tempfile.TemporaryDirectory() as directory:
        reference = make_reference("llama", Path(directory))
        with engine_of(setting, model=directory, load_format="auto", dtype="float32") as engine:
            ours = generate(engine, prompts, count)
            replays = engine.figures.replays
    theirs = [reference_greedy(reference, prompt, count) for prompt in prompts]
    assert ours == theirs, f"greedy tokens differ: {ours} and {theirs}"
    assert replays or not setting.on_gpu, "no step was a graph"
    return f"{len(prompts) * count} tokens equal, {replays} steps were graphs"


@torch.inference_mode()
def replay_equal(setting: Setting) -> str:
    """The same steps as graphs and as launches on the same padded inputs have the same bits."""
    dtype = "bfloat16" if setting.on_gpu else "float32"
    model = load_model("tiny-qwen3", dtype=dtype, device=setting.device, load_format="dummy")
    first = CudaRecorder(setting.device) if setting.on_gpu else RerunRecorder()
    runners = [captured(model.decoder, recorder) for recorder in (first, RerunRecorder())]
    steps = list(some_steps(model.config.vocab_size))
    for runner in runners:
        runner.capture_first()
    for inputs in steps:
        graph, eager = (runner.run(inputs).clone() for runner in runners)
        assert torch.equal(graph, eager), f"logits of {inputs.batch.num_tokens} rows differ"
    assert runners[0].figures.replays == len(steps) - 1, "decode steps were not graphs"
    return f"{len(steps) - 1} steps equal to the bit"


def captured(decoder: TextModel, recorder: Any) -> CapturedRunner:
    """A runner with graphs of up to 8 rows over a cache of its own."""
    kv = KVCache(decoder.config, 200, BLOCK, decoder.dtype, decoder.device)
    plan = plan_graphs((1, 2, 4, 8), (512, 1024))
    return CapturedRunner(decoder, kv, plan, recorder, lambda: 0)


def some_steps(vocab_size: int) -> Iterator[StepInputs]:
    """A prefill of six prompts, then decodes of some of them whose contexts cross a band."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 16, 40, 250, 509, 511]
    order = (torch.randperm(199, generator=generator) + 1).tolist()
    tables = [[order.pop() for _ in range(33)] for _ in lengths]

    def step(rows: Sequence[int], queries: Sequence[int]) -> StepInputs:
        contexts = [lengths[row] for row in rows]
        batch = AttentionBatch.build(queries, contexts, [tables[row] for row in rows], BLOCK, "cpu")
        ids = torch.randint(0, vocab_size, (batch.num_tokens,), generator=generator)
        return StepInputs(ids, batch, batch.last_rows.tolist())

    yield step(range(6), lengths)
    for rows in ([0, 1, 2, 3, 4, 5], [5], [0, 3], [1, 2, 4], [0, 1, 2, 3, 4, 5], [4, 5, 0, 1, 2]):
        for row in rows:
            lengths[row] += 1
        yield step(rows, [1] * len(rows))


def no_waiting(setting: Setting) -> str:
    """Steady decode steps, greedy and sampled, under torch's alarm for waits and blocking copies."""
    steps = 60
    for temperature in (0.0, 0.8):
        with engine_of(setting) as engine:
            add(engine, [tokens_of_text(40 + 9 * row) for row in range(8)], 200, temperature)
            while engine.step().num_tokens != 8 or engine.planner.waiting:
                pass
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(steps):
                    assert engine.step().num_tokens == 8, "the state was not steady"
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return f"{steps} greedy and {steps} sampled steps"


def same_tokens(setting: Setting) -> str:
    """Seeded texts in float32 with everything on, and with one launch after the other."""
    prompts, count = [tokens_of_text(5 + 31 * row) for row in range(7)], 40
    texts = []
    for plain in (False, True):
        with engine_of(setting, dtype="float32", disable_cuda_graph=plain) as engine:
            texts.append(generate(engine, prompts, count, temperature=0.9))
    assert texts[0] == texts[1], "texts differ"
    return f"{len(prompts) * count} seeded tokens equal"


def any_batch(setting: Setting) -> str:
    """In 16 bits on a GPU: each prompt alone, all together, with small chunks, and without graphs."""
    prompts = [tokens_of_text(3 + (37 if setting.on_gpu else 9) * row) for row in range(12)]
    count = 48 if setting.on_gpu else 8
    with engine_of(setting, deterministic=True) as engine:
        alone = [generate(engine, [prompt], count)[0] for prompt in prompts]
    for options in ({}, {"max_step_tokens": 64}, {"disable_cuda_graph": True}):
        with engine_of(setting, deterministic=True, **options) as engine:
            together = generate(engine, prompts, count)
        differ = sum(one != other for one, other in zip(alone, together, strict=True))
        assert not differ, f"{differ} of {len(prompts)} texts differ from those alone, with {options}"
    return f"{len(prompts)} texts of {count} tokens"


@contextlib.contextmanager
def engine_of(setting: Setting, **options: Any) -> Iterator[Engine]:
    """A worker's engine as `sfllm serve` builds it, with random weights of a small shape."""
    defaults = {"model": "tiny-qwen3", "load_format": "dummy", "device": setting.device.type}
    sizes = {
        "max_context_length": 1024,
        "max_batch_size": 16,
        "max_running_tokens": 8192,
        "block_size": BLOCK,
    }
    if not setting.on_gpu or Path(str(options.get("model", ""))).is_dir():
        sizes["max_context_length"] = 256
    engine = build(WorkerSettings(**{**defaults, **sizes, **options})).engine
    assert isinstance(engine, Engine)
    try:
        yield engine
    finally:
        del engine
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()


def add(
    engine: Engine, prompts: Sequence[Sequence[int]], count: int, temperature: float = 0.0
) -> list[sequences.Sequence]:
    """Give the engine prompts, each to be continued by so many tokens."""
    added = []
    for index, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=count, seed=index, temperature=temperature, ignore_eos=True)
        added.append(sequences.Sequence(index, 0, list(prompt), len(prompt), sampling))
        engine.add(added[-1])
    return added


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], count: int, temperature: float = 0.0
) -> list[list[int]]:
    """The prompts' continuations, run together."""
    added = add(engine, prompts, count, temperature)
    while engine.has_work:
        engine.step()
    return [sequence.tokens[len(prompt) :] for sequence, prompt in zip(added, prompts, strict=True)]
